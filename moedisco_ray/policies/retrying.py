"""What follows when a unit's workers end before their time.

| end | what follows |
| --- | --- |
| preempted | again, without limit |
| died | its process, for a reason that nobody saw: again, a bounded number of times |
| failed, or its checkpoints' storage did not answer | the same |
| failed again at one step, or a loss not finite | poisoned: once, back to an earlier checkpoint and past some batches |
| out of memory | again with half the micro-batch, down to 1; the global batch stays |

Going back and leaving batches out follows Chowdhery et al., "PaLM" (arXiv 2204.02311, section 5.1): they went back some 100
steps before a spike of the loss and skipped the 200 to 500 batches around it; the spike did not come back, though
the same batches did no harm elsewhere: it takes both the batch and the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

EndKind = Literal["preempted", "died", "failed", "storage", "not_finite", "out_of_memory"]

MAY_GO_BACK: frozenset[EndKind] = frozenset({"failed", "not_finite"})
"""Ends of which `decide` must know the checkpoints."""

_OUT_OF_MEMORY = ("out of memory", "outofmemoryerror", "running low on memory", "cublas_status_alloc_failed")


@dataclasses.dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        kind: What it was.
        step: The step that was under way, counted from 0; None: none was, as far as is known.
        reason: One line for people.
        saved: Whether no work is lost: it was announced, and used for a checkpoint; or there was no machine to begin on.
    """

    kind: EndKind
    step: int | None
    reason: str
    saved: bool = False

    @property
    def costly(self) -> bool:
        """Whether work was lost with a process or a machine: what `checkpointing.loss_rate` counts."""
        return self.kind in ("died", "preempted") and not self.saved


@dataclasses.dataclass(frozen=True)
class Skip:
    """Batches that are left out. From step `start` on, a step takes the batch `width` places further on."""

    start: int
    width: int

    def batch(self, step: int) -> int:
        """The number of the batch that a step takes."""
        return step + self.width if step >= self.start else step


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is put up with.

    Attributes:
        failures: How often a unit that failed is started again, the count beginning anew after going back.
        same_step: Ends in a row that `failed` at one step, and call it poisoned.
        window: Steps to go back before a poisoned step, and batches to leave out behind it.
    """

    failures: int = 3
    same_step: int = 2
    window: int = 100


@dataclasses.dataclass(frozen=True)
class History:
    """What the next attempt of a unit must know of the earlier ones.

    Attributes:
        micro_batch: Sequences of one forward pass.
        failures: Failures so far, since it went back if it did.
        step: At which the last of them was; None: there was none, or no step was known to be under way.
        at_step: How many in a row `failed` at that step.
        skip: Batches that are left out since it went back; None: it never did.
    """

    micro_batch: int
    failures: int = 0
    step: int | None = None
    at_step: int = 0
    skip: Skip | None = None


@dataclasses.dataclass(frozen=True)
class Again:
    """Start again from the newest checkpoint."""

    history: History


@dataclasses.dataclass(frozen=True)
class GoBack:
    """Drop the checkpoints after `checkpoint` (0: all of them), then start again, leaving out `history.skip`."""

    history: History
    checkpoint: int


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Stop the unit and report it.

    Attributes:
        reason: One line for people.
        poisoned: Whether its state or data is to blame, rather than the program or a machine that is too small.
    """

    reason: str
    poisoned: bool


Decision = Again | GoBack | GiveUp


def window_of(steps: int) -> int:
    """A window for a training of `steps` steps: PaLM's hundred, in short ones a twentieth."""
    return max(1, min(100, steps // 20))


def kind_of(reason: str, *, node_lost: bool, finite: bool = True) -> EndKind:
    """What an end was.

    Args:
        reason: The error's type and text.
        node_lost: The node was drained, or is gone.
        finite: False: the trainer found a loss or gradient that is not.
    """
    if not finite:
        return "not_finite"
    if node_lost:
        return "preempted"
    return "out_of_memory" if any(words in reason.lower() for words in _OUT_OF_MEMORY) else "failed"


def decide(history: History, end: End, checkpoints: Sequence[int], limits: Limits) -> Decision:
    """What follows an end.

    Args:
        history: Of the attempt that ended.
        end: How it ended.
        checkpoints: Steps of the checkpoints that are there; of ends outside `MAY_GO_BACK` none need be named.
        limits: What is put up with.
    """
    if end.kind == "preempted":
        return Again(history)
    if end.kind == "out_of_memory":
        return _halve(history, end)
    # A process that dies tells only roughly where it was, and a storage that is away, or a start that fails, tells of no batch.
    at_step = 0
    if end.kind == "failed" and end.step is not None:
        at_step = history.at_step + 1 if end.step == history.step else 1
    history = dataclasses.replace(history, failures=history.failures + 1, step=end.step, at_step=at_step)
    if end.kind == "not_finite" or at_step >= limits.same_step:
        return _go_back(history, end, checkpoints, limits.window)
    if history.failures > limits.failures:
        where = "before it told of a step" if end.step is None else f"at step {end.step}"
        return GiveUp(f"failed {history.failures} times, the last {where}: {end.reason}", poisoned=False)
    return Again(history)


def _halve(history: History, end: End) -> Again | GiveUp:
    if history.micro_batch <= 1:
        return GiveUp(f"one sequence at a time is too much for the worker's memory: {end.reason}", poisoned=False)
    return Again(dataclasses.replace(history, micro_batch=history.micro_batch // 2))


def _go_back(history: History, end: End, checkpoints: Sequence[int], window: int) -> GoBack | GiveUp:
    if history.skip is not None:
        return GiveUp(
            f"poisoned: it went back and left {history.skip.width} batches out, and yet at step {end.step}: {end.reason}",
            poisoned=True)
    # The step that was last told of may be before the newest checkpoint; a loss that is not finite names its own.
    told = end.step or 0
    step = told if end.kind == "not_finite" else max(told, *checkpoints, 0)
    before = sorted(checkpoint for checkpoint in checkpoints if checkpoint <= step)
    # Where none is old enough, the oldest: up to there the losses were finite, and the beginning may be days away.
    oldest = before[0] if before else 0
    target = max((checkpoint for checkpoint in before if checkpoint <= step - window), default=oldest)
    start = max(target, step - window)
    return GoBack(History(history.micro_batch, skip=Skip(start, step + window + 1 - start)), target)
