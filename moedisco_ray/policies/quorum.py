"""When the merge may start although sub-models are missing, and what each missing one contributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

State = Literal["finished", "training", "given_up"]
Contribution = Literal["finished", "checkpoint", "seed"]


@dataclasses.dataclass(frozen=True)
class Quorum:
    """What is waited for.

    Attributes:
        needed: How many must be finished; None: all.
        patience: For how long the rest is waited for then; see `decide`.
    """

    needed: int | None = None
    patience: float = 1.5


ALL = Quorum()


@dataclasses.dataclass(frozen=True)
class Member:
    """A sub-model, as it stands.

    Attributes:
        name: The unit.
        state: Waiting counts as training.
        ended: Seconds from the phase's beginning to its end; of finished members.
        expected: Seconds that it was expected to take on one slot, alone.
        checkpoint: Steps of its last checkpoint; 0: there is none.
    """

    name: str
    state: State
    ended: float = 0.0
    expected: float = 0.0
    checkpoint: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether to go on.

    Attributes:
        action: `fail`: so many gave up that the quorum cannot be reached.
        seconds: Until the rest have had their time, as things stand; 0 unless there is a quorum that waits.
        contributions: Of each member, if the merge began now.
    """

    action: Literal["wait", "go", "fail"]
    seconds: float
    contributions: Mapping[str, Contribution]


def decide(members: Sequence[Member], quorum: int | None, now: float, patience: float = 1.5) -> Verdict:
    """Whether the merge may start.

    The rest have had their time when the phase has lasted `patience` times as long as the quorum took, or as the longest
    of the missing was expected to take, whichever is more.

    Args:
        members: All sub-models.
        quorum: How many must be finished; None: all.
        now: Seconds since the phase began.
        patience: At least 1.
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
    """What a sub-model gives to the merge as it stands: itself, its last checkpoint, or the seed that it began from."""
    if member.state == "finished":
        return "finished"
    return "checkpoint" if member.checkpoint else "seed"
