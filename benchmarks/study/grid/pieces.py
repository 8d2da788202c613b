"""The pieces of the grid, in the order in which they are measured.

A piece is one arm in one cell with one seed, or the sweep that tunes an arm. Each has a result file of its own, which
is written atomically when the piece is done, so that a killed grid continues with the piece that it lost.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid.cells import (
    BUDGETS,
    FAMILIES,
    GPU_SHAPE,
    REPORT_SEEDS,
    SHAPES,
    STARTS,
    TUNING_SEED,
    Cell,
    ScaleName,
    Start,
)
from moedisco_ray.core.config import FamilyName

OURS = "disco"
HALF = "half"
ARMS = (REFERENCE, OURS, HALF, "expert-upcycling", "upcycle")
"""Arms of the grid, most important first."""
GPU_ARMS = (REFERENCE, OURS, "expert-upcycling")
_FIRST = (REFERENCE, OURS)
"""Arms that are measured in all corpora before the others."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A unit of work of the grid.

    Attributes:
        kind: `report` measures the arm in the cell; `tune` sweeps the arm's settings in it.
        cell: The cell.
        arm: Name of the arm.
        seed: Seed of the run.
    """

    kind: Literal["tune", "report"]
    cell: Cell
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.cell}-{self.arm}-{self.seed}"

    def path(self, folder: Path) -> Path:
        """The piece's result file."""
        return folder / f"{self}.json"


@dataclasses.dataclass(frozen=True)
class Axes:
    """The values of each axis of a grid, most important first.

    Attributes:
        corpora: Corpora on which cells are reported.
        families: Model families.
        starts: Starts.
        shapes: Experts and top-k.
        budgets: Multiples of the smallest budget.
        arms: Names of the arms, joint training first.
        seeds: Seeds.
        scale: Kind of machine.
    """

    corpora: Sequence[str]
    families: Sequence[FamilyName] = FAMILIES
    starts: Sequence[Start] = STARTS
    shapes: Sequence[tuple[int, int]] = SHAPES
    budgets: Sequence[int] = BUDGETS
    arms: Sequence[str] = ARMS
    seeds: Sequence[int] = REPORT_SEEDS
    scale: ScaleName = "cpu"


def gpu_axes(corpora: Sequence[str]) -> Axes:
    """The grid's GPU form: three arms in one cell, planned for 45 minutes of one large card."""
    return Axes(
        corpora[:1], FAMILIES[:1], STARTS[:1], (GPU_SHAPE,), BUDGETS[:1], GPU_ARMS, REPORT_SEEDS[:1], scale="gpu"
    )


def reporting(axes: Axes) -> list[Piece]:
    """The pieces of a grid's cells, in an order in which a part of the grid is useful.

    Cells get larger and less important along a diagonal over budgets and shapes. Within it, each seed is complete
    before the next one, and joint training and ours are measured everywhere before the rivals.
    """

    def importance(piece: Piece) -> tuple[int, ...]:
        cell = piece.cell
        budget, shape = axes.budgets.index(cell.budget), axes.shapes.index((cell.experts, cell.top_k))
        place = (axes.corpora.index(cell.corpus), axes.families.index(cell.family), axes.starts.index(cell.start))
        return (
            budget + shape,
            axes.seeds.index(piece.seed),
            budget,
            int(piece.arm not in _FIRST),
            *place,
            axes.arms.index(piece.arm),
        )

    return sorted(
        (
            Piece(
                "report",
                Cell(
                    corpus=corpus,
                    family=family,
                    start=start,
                    experts=experts,
                    top_k=top_k,
                    budget=budget,
                    scale=axes.scale,
                ),
                arm,
                seed,
            )
            for corpus, family, start, (experts, top_k), budget, arm, seed in itertools.product(
                axes.corpora, axes.families, axes.starts, axes.shapes, axes.budgets, axes.arms, axes.seeds
            )
        ),
        key=importance,
    )


def with_tuning(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces, each after the sweep that tunes its arm in its tuning cell."""
    ordered: dict[Piece, None] = {}
    for piece in pieces:
        ordered |= {Piece("tune", piece.cell.recipe, piece.arm, TUNING_SEED): None, piece: None}
    return list(ordered)
