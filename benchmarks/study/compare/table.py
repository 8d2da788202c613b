"""Shows a comparison as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from benchmarks.study.compare.records import Comparison, Row
from moedisco_ray.cli.display.formatting import PlainTable, count

_BUDGETS = {"tokens": "At equal tokens", "dollars": "At equal planned dollars", "loss": "To about the same loss"}


def compare_view(result: Comparison) -> RenderableType:
    """One table per budget; joint training is the first row of each."""
    joint = result.rows[0]
    parts: list[RenderableType] = []
    for budget, title in _BUDGETS.items():
        rows = [row for row in result.rows[1:] if row.budget == budget]
        if not rows:
            continue
        table = PlainTable(
            "",
            "tokens",
            "FLOP",
            "planned $",
            "hours",
            "metered",
            "loss",
            "perplexity",
            "vs joint",
            "to its loss",
            "batch, rate, schedule",
        )
        for row in (joint, *rows):
            table.add_row(
                row.title,
                count(row.tokens),
                f"{row.flops:.1e}",
                f"{row.dollars:.3g}",
                f"{row.hours:.3g}",
                f"{row.metered_dollars:.3g}",
                f"{row.loss:.3f}",
                f"{row.perplexity:.1f}",
                _change(row.perplexity, joint.perplexity),
                _change(row.dollars_to_target, joint.dollars_to_target),
                _settings(row),
            )
        parts += [Text(title, style="bold"), table, Text()]
    parts.append(
        Text(
            "Dollars and hours are planned, unless they are metered: of training, clusters, merge and evaluation, "
            "without measurements of the held-out loss. To its loss: dollars until the held-out loss first reached "
            f"joint training's last, {result.target_loss:.3f}, relative to joint training's dollars. One seed: repeat "
            f"it with others. {_how_tuned(result.rows)}",
            style="dim",
        )
    )
    return Group(*parts)


def _settings(row: Row) -> str:
    tuned = row.tuned
    return f"{tuned.batch_tokens:,}, {tuned.lr:.2g}, {tuned.schedule}" if tuned else "as configured"


def _how_tuned(rows: Sequence[Row]) -> str:
    tuned = [row.tuned for row in rows if row.tuned]
    if not tuned:
        return (
            "Learning rates, schedules and batch sizes are as configured, so arms may be further from their best than "
            "others; --slice-tokens tunes them."
        )
    how = (
        f"the best of up to {max(each.trainings for each in tuned)} trainings of {tuned[0].slice_tokens:,} tokens each"
    )
    return (
        f"Batch size (tokens), learning rate and schedule of the whole MoE's training: {how}, on the validation "
        "documents, where it is also better than the configured values at full length."
    )


def _change(value: float | None, reference: float | None) -> str:
    return "never" if value is None or reference is None else f"{100 * (value / reference - 1):+.1f} %"
