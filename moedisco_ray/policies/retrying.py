"""What to do when the workers of a unit end too early.

| end | decision |
| --- | --- |
| preempted | restart, without limit |
| torch could not use the worker's GPU, before the training began | restart elsewhere, without limit |
| died, for an unknown reason | restart, a limited number of times |
| failed, or the checkpoint storage did not respond | restart, a limited number of times |
| failed again at the same step, or the loss is not finite | once: go back to an earlier checkpoint and skip batches |
| out of memory on a GPU | once: restart with settings that are planned to need 7 % less memory (`plan.refit`) |
| out of memory | restart with half of the micro-batch, down to 1; the global batch stays |
| out of memory with a micro-batch of 1 | once: recompute activations, if the configuration leaves that open |
| out of memory on a GPU with both | as the first time, while settings are left that need less |

Going back and skipping batches follows Chowdhery et al., "PaLM" (arXiv 2204.02311, section 5.1). They restarted about
100 steps before a loss spike and skipped 200 to 500 batches. The spike did not return. The same batches caused no spike
when the training met them in another state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

EndKind = Literal["preempted", "bad_card", "died", "failed", "storage", "not_finite", "out_of_memory"]

MAY_GO_BACK: frozenset[EndKind] = frozenset({"failed", "not_finite"})
"""Kinds of an attempt's end after which `decide` may choose to go back to an earlier checkpoint. Only for these does it
need the list of checkpoints."""

_OUT_OF_MEMORY = ("out of memory", "outofmemoryerror", "running low on memory", "cublas_status_alloc_failed")


@dataclasses.dataclass(frozen=True)
class End:
    """How an attempt ended.

    Attributes:
        step: The step at which the attempt ended, counted from 0; None if unknown.
        reason: One line for users.
        saved: Whether no work is lost, because an announced loss left time for a checkpoint, or no machine had started.
    """

    kind: EndKind
    step: int | None
    reason: str
    saved: bool = False

    @property
    def costly(self) -> bool:
        """Whether a lost process or machine cost work, so that it counts for `checkpointing.loss_rate`."""
        return self.kind in ("died", "preempted") and not self.saved


@dataclasses.dataclass(frozen=True)
class Skip:
    """Batches to skip: from step `start` on, step i trains on batch i + `width`."""

    start: int
    width: int

    def batch(self, step: int) -> int:
        return step + self.width if step >= self.start else step


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of retries.

    Attributes:
        failures: Maximum number of restarts of a failed unit; going back resets the count.
        same_step: Number of consecutive failures at one step after which the unit goes back to an earlier checkpoint.
        window: Number of steps to go back before the failed step, and of batches to skip after it.
    """

    failures: int = 3
    same_step: int = 2
    window: int = 100


@dataclasses.dataclass(frozen=True)
class History:
    """What the next attempt of a unit needs from the earlier ones.

    Attributes:
        micro_batch: Sequences per forward pass.
        failures: Number of failures; going back resets it.
        step: Step of the last failure; None if there was none or its step is unknown.
        at_step: Number of consecutive failures at that step.
        skip: Skipped batches; None if the unit never went back.
        recompute: Whether activations are recomputed for want of memory; None: the configuration decides it.
        replanned: Whether the settings were planned again for want of memory.
        fp8_moments: Whether AdamW's moments are stored in 8 bits for want of memory.
        offload_moments: Whether they are in the machine's memory for want of the card's.
    """

    micro_batch: int
    failures: int = 0
    step: int | None = None
    at_step: int = 0
    skip: Skip | None = None
    recompute: bool | None = None
    replanned: bool = False
    fp8_moments: bool = False
    offload_moments: bool = False


@dataclasses.dataclass(frozen=True)
class Again:
    """Restart from the newest checkpoint."""

    history: History


@dataclasses.dataclass(frozen=True)
class GoBack:
    """Delete the checkpoints after step `checkpoint` (0: all), then restart and skip the batches of `history.skip`."""

    history: History
    checkpoint: int


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Stop the unit and report it.

    Attributes:
        reason: One line for users.
        diverged: Whether the training's state or data is the cause, so that it fails on any machine.
    """

    reason: str
    diverged: bool


Decision = Again | GoBack | GiveUp


def window_of(steps: int) -> int:
    """The value of `Limits.window` for a training of `steps` steps: a twentieth of them, at most 100 as in PaLM."""
    return max(1, min(100, steps // 20))


def kind_of(reason: str, *, node_lost: bool, finite: bool = True) -> EndKind:
    """How an attempt ended, judged by its error.

    Args:
        reason: Type and text of the error.
        node_lost: Whether the node was drained or is gone.
        finite: Whether all losses and gradients were finite.
    """
    if not finite:
        return "not_finite"
    if node_lost:
        return "preempted"
    return "out_of_memory" if any(words in reason.lower() for words in _OUT_OF_MEMORY) else "failed"


def decide(history: History, end: End, checkpoints: Sequence[int], limits: Limits) -> Decision:
    """The decision after an attempt has ended.

    Args:
        history: History of the attempt that ended.
        end: How the attempt ended.
        checkpoints: Steps of the existing checkpoints; only used if the kind of end is in `MAY_GO_BACK`.
        limits: Limits of retries.
    """
    if end.kind in ("preempted", "bad_card"):
        return Again(history)
    if end.kind == "out_of_memory":
        return _with_less_memory(history, end)
    # Only a failure at a known step is evidence against the step's batch. If a process died, its step is not known
    # precisely.
    at_step = 0
    if end.kind == "failed" and end.step is not None:
        at_step = history.at_step + 1 if end.step == history.step else 1
    history = dataclasses.replace(history, failures=history.failures + 1, step=end.step, at_step=at_step)
    if end.kind == "not_finite" or at_step >= limits.same_step:
        return _go_back(history, end, checkpoints, limits.window)
    if history.failures > limits.failures:
        where = "before its first step" if end.step is None else f"at step {end.step}"
        return GiveUp(f"failed {history.failures} times, the last {where}: {end.reason}", diverged=False)
    return Again(history)


def _with_less_memory(history: History, end: End) -> Again | GiveUp:
    """Take the levers that change no result beyond rounding, the cheapest first."""
    if history.micro_batch <= 1 and history.recompute is False:
        return Again(dataclasses.replace(history, recompute=True))
    if history.micro_batch <= 1:
        return GiveUp(f"one sequence does not fit into the worker's memory: {end.reason}", diverged=False)
    return Again(dataclasses.replace(history, micro_batch=history.micro_batch // 2))


def _go_back(history: History, end: End, checkpoints: Sequence[int], window: int) -> GoBack | GiveUp:
    if history.skip is not None:
        what = "diverged" if end.kind == "not_finite" else "failed"
        return GiveUp(
            f"{what} at step {end.step} after it went back and skipped {history.skip.width} batches: {end.reason}",
            diverged=True,
        )
    # Training may have got further than the last reported step, at least up to its newest checkpoint. If a loss was not
    # finite, the reported step is exact.
    reported = end.step or 0
    step = reported if end.kind == "not_finite" else max(reported, *checkpoints, 0)
    before = sorted(checkpoint for checkpoint in checkpoints if checkpoint <= step)
    # Without a checkpoint that is old enough, take the oldest: its losses were finite, and step 0 may be days back.
    oldest = before[0] if before else 0
    target = max((checkpoint for checkpoint in before if checkpoint <= step - window), default=oldest)
    start = max(target, step - window)
    skip = Skip(start, step + window + 1 - start)
    return GoBack(dataclasses.replace(history, failures=0, step=None, at_step=0, skip=skip), target)
