"""Measures the pieces of the grid, one after the other, in this process and with one thread.

Each piece is a product run on the local backend, which resumes from its last checkpoint. A run directory is removed
once its result is written; only the corpus stays, for the other arms of the cell.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment
from benchmarks.study.compare.arms import Arm, arm_config, run_name
from benchmarks.study.compare.reading import evaluated
from benchmarks.study.compare.records import PhaseCost
from benchmarks.study.compare.run import measured, share_corpus
from benchmarks.study.compare.tuning import tune
from benchmarks.study.grid.cells import base_config
from benchmarks.study.grid.files import PUBLISHED, published_tuned, read_piece, read_tuned, write
from benchmarks.study.grid.find_corpus import EMBEDDED
from benchmarks.study.grid.levers import KNOWN
from benchmarks.study.grid.pieces import Piece
from benchmarks.study.grid.records import Made, Phase, PieceResult, TunedArm
from benchmarks.study.recipe import recipe
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DivergedError
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

SLICES_PER_BUDGET = 4
"""A slice of a sweep has a quarter of the smallest budget's tokens."""
_SHARED = "shared"
"""Folder that keeps the corpus of a cell and seed."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a grid reads and writes.

    Attributes:
        corpora: Folder of the corpora; None if there is none.
        work: Folder of the run directories.
        results: Folder of the raw results.
        published: Folder of the published results, whose tuned settings count where no raw ones exist.
    """

    corpora: Path | None
    work: Path
    results: Path
    published: Path = PUBLISHED


def run_pieces(pieces: Sequence[Piece], places: Places, command: str, *, hours: float | None = None) -> list[Piece]:
    """Measure the pieces that have no result file yet.

    Args:
        pieces: Pieces in the order in which they are measured.
        places: Where the grid reads and writes.
        command: Command line to record in the results.
        hours: Time after which no further piece starts; None means no limit.

    Returns:
        The pieces that still have no result.
    """
    torch.set_num_threads(1)
    begun, left = time.monotonic(), []
    for piece in pieces:
        if is_done(piece, places):
            continue
        if hours is not None and time.monotonic() - begun >= 3600 * hours:
            left.append(piece)
            continue
        started = time.monotonic()
        try:
            measure(piece, places, command)
        except DivergedError as error:
            left.append(piece)
            print(f"{piece}: {error}", file=sys.stderr)
            continue
        print(f"{piece}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return left


def is_done(piece: Piece, places: Places) -> bool:
    """Whether a piece has a result; one without the values that a sweep of its arm chose is measured again."""
    tuned = tuned_arm(piece, places)
    if piece.kind == "tune":
        return tuned is not None
    path = piece.path(places.results)
    if not path.exists():
        return False
    return tuned is None or tuned.chose(read_piece(path).recipe)


def measure(piece: Piece, places: Places, command: str) -> None:
    """Measure one piece, or continue it, and write its result file.

    Raises:
        DivergedError: The arm's training diverged.
    """
    started = time.monotonic()
    work = places.work / f"{piece.cell}-{piece.seed}"
    base = base_config(piece.cell, piece.seed, places.corpora, work)
    result = _tune(piece, base, work) if piece.kind == "tune" else _report(piece, base, work, places)
    about = environment(command)
    made = Made(
        command=command,
        commit=f"{about['commit']}{' with uncommitted changes' if about['dirty'] else ''}",
        date=about["date"],
        processor=about["processor"],
        cores=about["cores"],
        versions=about["versions"],
        seconds=round(time.monotonic() - started, 1),
    )
    write(piece.path(places.results), result.model_copy(update={"made": made}))
    _remove(work / run_name(piece.arm, "tokens"))


def tuned_arm(piece: Piece, places: Places) -> TunedArm | None:
    """The result of a sweep in the piece's tuning cell that applies to the arm as it is now; None if there is none."""
    known = [*read_tuned(places.results), *published_tuned(places.published)]
    own, settings = (piece.cell.recipe, piece.arm), _before_tuning(piece)
    return next((each for each in known if (each.cell, each.arm) == own and each.applies_to(settings)), None)


def _before_tuning(piece: Piece) -> dict[str, Any]:
    """Settings of the arm in the piece's cell without tuned values; neither corpus nor start changes them."""
    cell = piece.cell.model_copy(update={"corpus": EMBEDDED, "start": "random"})
    base = base_config(cell, piece.seed, None, Path("runs"))
    return recipe(arm_config(base, piece.arm, KNOWN[piece.arm], base.output, "tokens", base.tokens.total))


def _report(piece: Piece, base: RunConfig, work: Path, places: Places) -> PieceResult:
    arm, tuned = KNOWN[piece.arm], tuned_arm(piece, places)
    if tuned is not None:
        arm = dataclasses.replace(arm, settings={**arm.settings, **tuned.values})
    config = arm_config(base, piece.arm, arm, work, "tokens", base.tokens.total)
    _run(config)
    row = measured(piece.arm, arm, "tokens", config, None if tuned is None else tuned.settings)
    return PieceResult(
        cell=piece.cell,
        arm=piece.arm,
        seed=piece.seed,
        loss=row.loss,
        bits_per_byte=row.bits_per_byte,
        unseen_perplexity=row.unseen,
        phases=tuple(_phase(phase, config) for phase in row.phases if phase.flops),
        recipe=row.recipe,
        tuned=row.tuned,
        made=_UNKNOWN,
    )


def _tune(piece: Piece, base: RunConfig, work: Path) -> TunedArm:
    arm: Arm = KNOWN[piece.arm]

    def train(config: RunConfig) -> float | None:
        try:
            _run(config)
        except DivergedError:
            return None
        loss = evaluated(config.directory, arm.measured).loss
        _remove(config.directory)
        return loss

    found = tune(base, piece.arm, arm, work, base.tokens.total // SLICES_PER_BUDGET, train)
    return TunedArm(
        cell=piece.cell,
        seed=piece.seed,
        arm=piece.arm,
        values=dict(found.values),
        settings=found.settings,
        made=_UNKNOWN,
        recipe={path: value for path, value in _before_tuning(piece).items() if path not in found.values},
    )


def _run(config: RunConfig) -> None:
    share_corpus(config, [RunStore.of(config.directory.parent / _SHARED)])
    pipeline.run(config, backend=LocalBackend())


def _remove(directory: Path) -> None:
    """Remove a run directory, if there is one, but keep its corpus if it is the first of its cell and seed."""
    shared = directory.parent / _SHARED / "corpus"
    if (directory / "corpus").is_dir() and not shared.exists():
        shared.parent.mkdir(parents=True, exist_ok=True)
        (directory / "corpus").rename(shared)
    shutil.rmtree(directory, ignore_errors=True)


def _phase(phase: PhaseCost, config: RunConfig) -> Phase:
    pool = config.pools.low_memory if phase.pool == "low_memory" else config.pools.high_memory
    worker_hours = phase.flops / pool.flops(config.model.architecture.num_experts) / 3600
    return Phase(pool=phase.pool, flops=phase.flops, workers=round(worker_hours / phase.hours, 3))


_UNKNOWN = Made(command="", commit="", date="", processor="", cores=0, versions={}, seconds=0.0)
"""Stands in until the result is written."""
