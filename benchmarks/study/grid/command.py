"""The commands `python -m benchmarks.study grid` and `... advise`."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid.advice import advise
from benchmarks.study.grid.cells import (
    BUDGETS,
    FAMILIES,
    REPORT_SEEDS,
    SHAPES,
    STARTS,
    TUNING_CORPUS,
    corpora_folder,
    report_corpora,
)
from benchmarks.study.grid.files import PUBLISHED, publish, published
from benchmarks.study.grid.find_corpus import EMBEDDED, known_corpora
from benchmarks.study.grid.levers import KNOWN
from benchmarks.study.grid.pieces import ARMS, Axes, gpu_axes, reporting, with_tuning
from benchmarks.study.grid.run import Places, is_done, run_pieces
from benchmarks.study.grid.section import ROWS
from benchmarks.study.grid.summary import JOINT_LOW
from moedisco_ray.cli.arguments import AsJson, ConfigPath, Overrides
from moedisco_ray.cli.console import output_console
from moedisco_ray.cli.display.formatting import PlainTable
from moedisco_ray.core.config import RunConfig, load_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan import with_cluster_count

_REPOSITORY = Path(__file__).resolve().parents[3]
_SHAPES = {f"{experts}x{top_k}": (experts, top_k) for experts, top_k in SHAPES}
_BUDGETS = {str(budget): budget for budget in BUDGETS}
_SEEDS = {str(seed): seed for seed in REPORT_SEEDS}

Value = TypeVar("Value")


def measure_grid(
    corpora: Annotated[
        str, typer.Option(metavar="A,B,...", help="Corpora to report on; omitted: all but the tuning corpus.")
    ] = "",
    families: Annotated[str, typer.Option(metavar="A,B,...", help="Model families.")] = ",".join(FAMILIES),
    starts: Annotated[str, typer.Option(metavar="A,B,...", help="Starts: random weights, or a dense seed.")] = ",".join(
        STARTS
    ),
    shapes: Annotated[str, typer.Option(metavar="ExK,...", help="Experts and top-k.")] = ",".join(_SHAPES),
    budgets: Annotated[str, typer.Option(metavar="1,4,...", help="Multiples of the smallest budget.")] = ",".join(
        _BUDGETS
    ),
    arms: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help=("Arms, or levers of benchmarks/study/grid/levers.py; joint training is always included."),
        ),
    ] = ",".join(ARMS),
    seeds: Annotated[str, typer.Option(metavar="0,1,...", help="Seeds to report.")] = ",".join(_SEEDS),
    hours: Annotated[
        float | None, typer.Option(metavar="H", min=0, help="Start no further piece after H hours.")
    ] = None,
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="Measure a model of a fifth of the parameters: more tokens per parameter in less time."
        ),
    ] = False,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu", help="Measure one cell on a large card instead, not tuned: three arms, planned for 45 minutes."
        ),
    ] = False,
    as_configured: Annotated[
        bool,
        typer.Option("--as-configured", help="Do not tune; arms without a stored sweep run at the starting values."),
    ] = False,
    corpus: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            envvar="MOEDISCO_CORPORA",
            help="Folder of the corpora; omitted: ../shared/corpora, if it exists.",
        ),
    ] = None,
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Run directories, which are removed piece by piece, and raw results.")
    ] = Path("runs") / "grid",
    publishes: Annotated[
        bool,
        typer.Option(
            "--publish",
            help="Also add the results to benchmarks/study/grid/results, from which the documents are made.",
        ),
    ] = False,
) -> None:
    """Measure the gap of each arm to joint training, over activation, budget, corpus, family and start.

    A killed grid continues where it was. The order of the pieces makes a part of the grid useful.
    """
    if small and gpu:
        raise ConfigError("--small", None, "is a model for a CPU; leave it out with --gpu")
    folder = corpus or corpora_folder(_REPOSITORY)
    reported = _chosen(
        "--corpora", corpora or ",".join(report_corpora(folder)), {name: name for name in report_corpora(folder)}
    )
    axes = (
        gpu_axes(_large(reported))
        if gpu
        else Axes(
            corpora=reported,
            families=_chosen("--families", families, {name: name for name in FAMILIES}),
            starts=_chosen("--starts", starts, {name: name for name in STARTS}),
            shapes=_chosen("--shapes", shapes, _SHAPES),
            budgets=_chosen("--budgets", budgets, _BUDGETS),
            arms=tuple(
                dict.fromkeys(
                    [REFERENCE, *_chosen("--arms", arms, {name: name for name in KNOWN if name != JOINT_LOW})]
                )
            ),
            seeds=_chosen("--seeds", seeds, _SEEDS),
            scale="small" if small else "cpu",
        )
    )
    pieces = reporting(axes)
    places = Places(folder, work, work / "results")
    command = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
    tunes = not (as_configured or gpu)  # three sweeps on the card would take four times as long as the cell
    ordered = with_tuning(pieces) if tunes else pieces
    if TUNING_CORPUS not in known_corpora(folder) and any(
        each.kind == "tune" and not is_done(each, places) for each in ordered
    ):
        raise ConfigError(
            "--corpus",
            None if folder is None else str(folder),
            (
                f"has no folder {TUNING_CORPUS!r}, on whose text arms are tuned; make one of other text with "
                "`python -m benchmarks.study.grid.build_corpus cut`, or add --as-configured"
            ),
        )
    left = run_pieces(ordered, places, command, hours=hours)
    if publishes:
        publish(places.results, PUBLISHED)
    output_console().print(f"{len(left)} pieces are left" if left else "all pieces are measured")


def advise_on(
    config: ConfigPath,
    overrides: Overrides = None,
    serving_tokens: Annotated[
        float,
        typer.Option(
            metavar="N",
            min=0,
            help="Tokens that the finished model will read and write, at the high-memory pool's price.",
        ),
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Recommend an arm with its settings, and a number of experts, by the published grid; refuses outside its range."""
    checked = with_cluster_count(load_config(config, [*(overrides or ()), "recipe=null"]))
    advice = advise(checked, published(PUBLISHED), serving_tokens)
    console = output_console()
    if as_json:
        console.file.write(f"{advice.model_dump_json(indent=2)}\n")
        return
    table = PlainTable("", "dollars", "gap, nats", "tuned")
    for each in advice.options:
        table.add_row(each.title, f"{each.dollars:.2f}", f"{each.gap:+.3f}", "yes" if each.tuned else "no")
    console.print(table)
    console.print("What differs from your settings, as --set takes it:")
    for each in advice.options:
        console.print(f"  {each.title}: {' '.join(_changes(checked, each.settings)) or 'nothing'}", soft_wrap=True)
    if len(advice.shapes) > 1:
        table = PlainTable("experts", "top-k", "dollars with serving", "arm")
        for shape in advice.shapes:
            table.add_row(str(shape.experts), str(shape.top_k), f"{shape.dollars:.2f}", ROWS[shape.arm])
        console.print(table)
    else:
        console.print("One number of experts is measured at these tokens, so none is recommended.")
    console.print(
        "Dollars are those until joint training's loss; joint training on the high-memory pool is 1. Fewest seeds "
        f"behind a figure: {advice.seeds}. Joint training on the low-memory pool needs a card that the whole MoE fits "
        "(pools.low_memory.max_workers=1), or a fast network between its cards."
    )


def _changes(config: RunConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    raw = config.model_dump(mode="json")
    for path, value in settings.items():
        if functools.reduce(lambda section, name: section[name], path.split("."), raw) != value:
            yield f"{path}={value if isinstance(value, str) else json.dumps(value)}"


def _large(corpora: Sequence[str]) -> Sequence[str]:
    """The corpora with enough text for a card.

    Raises:
        ConfigError: There is only the embedded one, which a card would read a hundred times.
    """
    large = [name for name in corpora if name != EMBEDDED]
    if not large:
        raise ConfigError(
            "--gpu", None, "needs a larger text than the embedded one; name a corpus with --corpora and --corpus"
        )
    return large


def _chosen(option: str, text: str, known: Mapping[str, Value]) -> tuple[Value, ...]:
    """The named values of an axis.

    Raises:
        ConfigError: There is no such value.
    """
    names = text.split(",")
    for name in names:
        if name not in known:
            raise ConfigError(option, name, f"is not on this axis; there are {', '.join(known)}")
    return tuple(known[name] for name in names)
