"""Summarises measured pieces: the gap to joint training at equal tokens, and what it costs to close it.

Dollars to joint training's loss are the dollars for the same tokens, times exp(gap / slope). The slope is how much
joint training's loss falls per e-fold of tokens (nats), between the two measured budgets next to the cell's. They are
unknown where an arm would need more than four times the tokens, or less than a quarter: the slope is not the same so
far away, nor for so different an arm.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid.cells import Cell
from benchmarks.study.grid.prices import books, dollars, hours_ratio
from benchmarks.study.grid.records import Figures, Phase, PieceResult, Spread

JOINT_LOW = "joint-low"
"""Joint training on all cheap cards at once: the same training as on the large card, with other prices and hours."""
FURTHEST = 4.0
"""Largest factor on the tokens over which the slope is used: that between two budgets."""


def summarise(pieces: Sequence[PieceResult]) -> list[Figures]:
    """One entry per cell and arm, over the seeds that joint training was measured with too."""
    by_arm: dict[tuple[str, str], list[PieceResult]] = {}
    for piece in sorted(pieces, key=lambda piece: (str(piece.cell), piece.arm, piece.seed)):
        by_arm.setdefault((str(piece.cell), piece.arm), []).append(piece)
    entries = []
    for (cell, arm), found in by_arm.items():
        joint = {piece.seed: piece for piece in by_arm.get((cell, REFERENCE), [])}
        both = [piece for piece in found if piece.seed in joint]
        if not both:
            continue
        slope = loss_slope(both[0].cell, pieces)
        entries.append(_entry(arm, both, joint, slope))
        if arm == REFERENCE:
            entries.append(_entry(JOINT_LOW, [on_cheap_cards(piece) for piece in both], joint, slope))
    return entries


def loss_slope(cell: Cell, pieces: Sequence[PieceResult]) -> float | None:
    """How much joint training's loss falls per e-fold of tokens at a cell's budget (nats).

    Args:
        cell: The cell.
        pieces: All measured pieces.

    Returns:
        The slope between the cell's budget and the next smaller one, or the next larger one for the smallest budget;
        None if joint training was measured at one budget only or with no common seed, or if more tokens did not lower
        its loss.
    """
    losses: dict[int, dict[int, float]] = {}
    for piece in pieces:
        if piece.arm == REFERENCE and piece.cell.model_copy(update={"budget": cell.budget}) == cell:
            losses.setdefault(piece.cell.budget, {})[piece.seed] = piece.loss
    pairs = list(itertools.pairwise(sorted(losses)))
    pair = next((pair for pair in pairs if pair[1] == cell.budget), pairs[0] if pairs else None)
    if pair is None:
        return None
    few, many = pair
    falls = [losses[few][seed] - losses[many][seed] for seed in losses[few].keys() & losses[many].keys()]
    slope = statistics.median(falls) / math.log(many / few) if falls else 0.0
    return slope if slope > 0 else None


def _entry(arm: str, pieces: Sequence[PieceResult], joint: Mapping[int, PieceResult], slope: float | None) -> Figures:
    cell, book = pieces[0].cell, books()["paper"]
    gaps = {piece.seed: piece.loss - joint[piece.seed].loss for piece in pieces}
    gap, phases, reference = statistics.median(gaps.values()), pieces[0].phases, joint[pieces[0].seed].phases
    more = _more_tokens(gap, slope)
    return Figures(
        corpus=cell.corpus,
        family=cell.family,
        start=cell.start,
        experts=cell.experts,
        top_k=cell.top_k,
        active_share=cell.active_share,
        budget_tokens=cell.tokens,
        arm=arm,
        seeds=tuple(piece.seed for piece in pieces),
        loss=statistics.median(piece.loss for piece in pieces),
        loss_gap=gap,
        gaps=gaps,
        scale=cell.scale,
        bits_per_byte=_median(piece.bits_per_byte for piece in pieces),
        unseen=_median(_ratio(piece.unseen_perplexity, joint[piece.seed].unseen_perplexity) for piece in pieces),
        loss_gap_spread=Spread(min=min(gaps.values()), max=max(gaps.values())),
        dollars_to_joint_loss=dollars(phases, reference, more),
        dollars_equal_tokens=dollars(phases, reference),
        hours_ratio=hours_ratio(phases, reference, book),
        tuned=all(piece.tuned and joint[piece.seed].tuned for piece in pieces),
    )


def _median(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else statistics.median(value for value in found if value is not None)


def _ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value / reference


def _more_tokens(gap: float, slope: float | None) -> float | None:
    if gap == 0:
        return 1.0  # no slope is needed
    if slope is None or abs(gap / slope) > math.log(FURTHEST):
        return None
    return math.exp(gap / slope)


def on_cheap_cards(piece: PieceResult) -> PieceResult:
    """A piece of joint training as if it had been trained on all cheap cards at once."""
    phases = tuple(
        Phase(pool="low_memory", flops=phase.flops, workers=phase.workers * piece.cell.groups) for phase in piece.phases
    )
    return piece.model_copy(update={"arm": JOINT_LOW, "phases": phases})
