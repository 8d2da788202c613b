"""Command that puts runs next to each other."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.cli.display.formatting import count
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.records.bill import format_dollars, format_seconds
from service.commands.connection import RUNS_PANEL, connected, find_run
from service.commands.output import write_json, write_table
from service.commands.views import add_row, left_aligned
from service.domain.comparison import MOST_RUNS

if TYPE_CHECKING:
    from service.schemas import Comparison

commands = typer.Typer()

_LONGEST = 60
"""Maximum length of a setting's value in the table, in characters."""
DIFFERENT_TEXT = "The held-out figures are of different text: they cannot be compared."


@commands.command(rich_help_panel=RUNS_PANEL)
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN [RUN...]", help="Ids or names of two to five runs.")],
    as_json: AsJson = False,
) -> None:
    """Compare runs: what differs in settings, stages, cost, held-out figures and samples."""
    if not 2 <= len(runs) <= MOST_RUNS:
        raise UserError("RUN", len(runs), f"is the number of runs; name 2 to {MOST_RUNS} of them")
    with connected() as client:
        found = client.compare([find_run(client, run) for run in runs])
    write_json(found) if as_json else write_table(comparison_view(found))


def comparison_view(found: Comparison) -> RenderableType:
    """Tables of what differs, with one column per run."""
    names = [one_line(name) for name in _names(found)]
    facts = left_aligned("", *names)
    add_row(facts, "id", *(each.id for each in found.runs))
    add_row(facts, "state", *(each.state.value for each in found.runs))
    add_row(facts, "cost", *(format_dollars(each.dollars) for each in found.runs))
    add_row(facts, "time", *(format_seconds(each.seconds) for each in found.runs))
    add_row(facts, "tokens", *(count(each.tokens) for each in found.runs))
    add_row(facts, "held-out loss", *(_figure(each.loss, 4) for each in found.runs))
    parts: list[RenderableType] = [facts]
    if not found.same_text:
        parts.append(Text(DIFFERENT_TEXT, "yellow"))
    settings = left_aligned("setting", *names)
    for difference in found.settings:
        add_row(settings, difference.setting, *map(_value, difference.values))
    parts.append(Padding(settings, (1, 0, 0, 0)) if found.settings else Text("All settings are equal.", "dim"))
    stages = left_aligned("stage", *names)
    for stage in found.stages:
        add_row(stages, stage.stage, *map(_stage, stage.seconds, stage.dollars))
    sources = left_aligned("perplexity", *names)
    for source in found.sources:
        add_row(sources, source.source, *(_figure(value, 2) for value in source.perplexity))
    parts += [Padding(table, (1, 0, 0, 0)) for table in (stages, sources) if table.row_count]
    for sample in found.samples:
        parts.append(Padding(Text(one_line(sample.prompt), "bold"), (1, 0, 0, 0)))
        for name, text in zip(names, sample.texts, strict=True):
            parts.append(Text(f"{name}: {'-' if text is None else one_line(text)}"))
    return Group(*parts)


def _names(found: Comparison) -> list[str]:
    """Names that differ: a retry has the name of the earlier run."""
    counts = Counter(each.name for each in found.runs)
    return [each.name if counts[each.name] == 1 else f"{each.name} {each.id[-4:]}" for each in found.runs]


def _stage(seconds: float | None, dollars: float | None) -> str:
    return "-" if seconds is None else f"{format_seconds(seconds)}, {format_dollars(dollars)}"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _value(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
