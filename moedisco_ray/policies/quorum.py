"""When the merge may start without some sub-models, and what each missing one contributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

State = Literal["finished", "training", "given_up"]
Contribution = Literal["finished", "checkpoint", "seed"]


@dataclasses.dataclass(frozen=True)
class Quorum:
    """The finished sub-models that the merge waits for.

    Attributes:
        needed: Number of sub-models that must be finished; None means all.
        patience: Limits how long the merge waits for the other sub-models after the quorum is reached; see `decide`.
    """

    needed: int | None = None
    patience: float = 1.5


ALL = Quorum()


@dataclasses.dataclass(frozen=True)
class Member:
    """Progress of a sub-model.

    Attributes:
        state: State of the sub-model. A sub-model that waits for a machine counts as training.
        ended: Seconds from the start of the phase to the end of the training, if it is finished.
        expected: Expected duration of the training in seconds, without waiting for machines.
        checkpoint: Step of the last checkpoint; 0 if there is none.
    """

    name: str
    state: State
    ended: float = 0.0
    expected: float = 0.0
    checkpoint: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision of `decide`.

    Attributes:
        action: `wait` for more sub-models, `go` (merge now), or `fail`, because the quorum cannot be reached any more.
        seconds: Seconds that the merge still waits for unfinished sub-models after the quorum is reached; 0 in all
            other cases.
        contributions: What each member would contribute now.
    """

    action: Literal["wait", "go", "fail"]
    seconds: float
    contributions: Mapping[str, Contribution]


def decide(members: Sequence[Member], quorum: int | None, now: float, patience: float = 1.5) -> Verdict:
    """Whether the merge may start.

    Once the quorum is reached, the merge waits for the missing sub-models until `patience` x t seconds after the phase
    began. Here t is the time at which the quorum was reached, or the longest expected duration of a missing sub-model
    if that is longer.

    Args:
        members: All sub-models.
        quorum: Number of sub-models that must be finished; None means all.
        now: Seconds since the start of the phase.
        patience: Factor in the formula above, at least 1.
    """
    needed = len(members) if quorum is None else quorum
    finished = sorted(member.ended for member in members if member.state == "finished")
    missing = [member for member in members if member.state == "training"]
    contributions = {member.name: contribution(member) for member in members}
    if len(finished) + len(missing) < needed:
        return Verdict("fail", 0.0, contributions)
    if len(finished) < needed:
        return Verdict("wait", 0.0, contributions)
    reached = finished[needed - 1] if needed else 0.0
    left = patience * max([reached, *(member.expected for member in missing)]) - now if missing else 0.0
    return Verdict("wait" if left > 0 else "go", max(0.0, left), contributions)


def contribution(member: Member) -> Contribution:
    """What a sub-model contributes to the merge now: itself, its last checkpoint, or the seed that it started from."""
    if member.state == "finished":
        return "finished"
    return "checkpoint" if member.checkpoint else "seed"
