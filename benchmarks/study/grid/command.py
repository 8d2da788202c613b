"""The command `python -m benchmarks.study grid`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from benchmarks.study.compare.arms import ARMS as KNOWN
from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid.cells import BUDGETS, FAMILIES, REPORT_SEEDS, SHAPES, STARTS, corpora_folder, report_corpora
from benchmarks.study.grid.files import PUBLISHED, publish
from benchmarks.study.grid.pieces import ARMS, Axes, gpu_axes, reporting, with_tuning
from benchmarks.study.grid.run import Places, run_pieces
from moedisco_ray.cli.console import output_console
from moedisco_ray.core.errors import ConfigError

_REPOSITORY = Path(__file__).resolve().parents[3]
_SHAPES = {f"{experts}x{top_k}": (experts, top_k) for experts, top_k in SHAPES}
_BUDGETS = {str(budget): budget for budget in BUDGETS}
_SEEDS = {str(seed): seed for seed in REPORT_SEEDS}

Value = TypeVar("Value")


def measure_grid(
    corpora: Annotated[str, typer.Option(metavar="A,B,...", help="Corpora to report on; omitted: all but the tuning corpus.")] = "",
    families: Annotated[str, typer.Option(metavar="A,B,...", help="Model families.")] = ",".join(FAMILIES),
    starts: Annotated[str, typer.Option(metavar="A,B,...", help="Starts: random weights, or a dense seed.")] = ",".join(STARTS),
    shapes: Annotated[str, typer.Option(metavar="ExK,...", help="Experts and top-k.")] = ",".join(_SHAPES),
    budgets: Annotated[str, typer.Option(metavar="1,4,...", help="Multiples of the smallest budget.")] = ",".join(_BUDGETS),
    arms: Annotated[str, typer.Option(metavar="A,B,...", help="Arms; joint training is always included.")] = ",".join(ARMS),
    seeds: Annotated[str, typer.Option(metavar="0,1,...", help="Seeds to report.")] = ",".join(_SEEDS),
    hours: Annotated[float | None, typer.Option(metavar="H", min=0, help="Start no further piece after H hours.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Measure one cell on a large card instead: three arms in 45 minutes.")] = False,
    as_configured: Annotated[bool, typer.Option(
        "--as-configured", help="Do not tune; arms without a stored sweep run at the starting values.")] = False,
    corpus: Annotated[Path | None, typer.Option(
        metavar="DIR", envvar="MOEDISCO_CORPORA", help="Folder of the corpora; omitted: ../shared/corpora, if it exists.")] = None,
    work: Annotated[Path, typer.Option(
        metavar="DIR", help="Run directories, which are removed piece by piece, and raw results.")] = Path("runs") / "grid",
    publishes: Annotated[bool, typer.Option(
        "--publish", help="Also add the results to benchmarks/study/grid/results, from which the documents are made.")] = False,
) -> None:
    """Measure the gap of each arm to joint training, over activation, budget, corpus, family and start.

    A killed grid continues where it was. The order of the pieces makes a part of the grid useful.
    """
    folder = corpus or corpora_folder(_REPOSITORY)
    reported = _chosen("--corpora", corpora or ",".join(report_corpora(folder)), {name: name for name in report_corpora(folder)})
    axes = gpu_axes(reported) if gpu else Axes(
        corpora=reported, families=_chosen("--families", families, {name: name for name in FAMILIES}),
        starts=_chosen("--starts", starts, {name: name for name in STARTS}), shapes=_chosen("--shapes", shapes, _SHAPES),
        budgets=_chosen("--budgets", budgets, _BUDGETS),
        arms=tuple(dict.fromkeys([REFERENCE, *_chosen("--arms", arms, {name: name for name in KNOWN})])),
        seeds=_chosen("--seeds", seeds, _SEEDS))
    pieces = reporting(axes)
    places = Places(folder, work, work / "results")
    command = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
    left = run_pieces(pieces if as_configured else with_tuning(pieces), places, command, hours=hours)
    if publishes:
        publish(places.results, PUBLISHED)
    output_console().print(f"{len(left)} pieces are left" if left else "all pieces are measured")


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
