"""Decides which queued runs start now, and why the others wait.

Runs are considered in the order of the queue. A run that waits for its owner's limit or for machines that do not exist
does not delay later runs. A run that waits for a free slot keeps its turn, because every run needs one slot to start.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class PoolNeed:
    """Slots that a run needs in one pool.

    Attributes:
        resources: Tag (custom Ray resource) of the pool; a mixed pool has one tag for each of its interchangeable node
            types.
        slots: Slots that must exist, free or not, because all workers of a gang run at the same time.
        free: Slots that must be free when the run starts.
    """

    resources: tuple[str, ...]
    slots: int
    free: int

    @property
    def name(self) -> str:
        """The pool's tags, joined for messages."""
        return " or ".join(self.resources)


@dataclasses.dataclass(frozen=True)
class QueuedRun:
    """A run in the queue."""

    run_id: str
    owner: str
    needs: tuple[PoolNeed, ...]
    held: str | None = None
    """Reason why the run may not start even if slots are free; None if it may."""


@dataclasses.dataclass(frozen=True)
class ActiveRun:
    """A run that has, or may have, a driver.

    Attributes:
        claims: Tags of each pool in which the run holds, or will soon hold, a slot.
    """

    owner: str
    claims: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class PoolRoom:
    """Slots of a pool, as Ray reported them a few seconds ago.

    Attributes:
        slots: All slots; one worker uses one slot.
        free: Slots not in use.
        pending: Workers that already wait for a slot.
    """

    slots: float
    free: float
    pending: int = 0


@dataclasses.dataclass(frozen=True)
class ClusterCapacity:
    """Slots of the whole cluster.

    Attributes:
        rooms: Slots by the tag of the pool.
        grows: Whether an autoscaler may add nodes.
    """

    rooms: Mapping[str, PoolRoom]
    grows: bool = False

    def room(self, resources: tuple[str, ...]) -> PoolRoom:
        """Slots of a pool, summed over its tags."""
        rooms = [self.rooms.get(resource, PoolRoom(0, 0)) for resource in resources]
        return PoolRoom(
            sum(room.slots for room in rooms), sum(room.free for room in rooms), sum(room.pending for room in rooms)
        )


@dataclasses.dataclass(frozen=True)
class RunLimits:
    """Limits on active runs.

    Attributes:
        runs: Limit over all owners.
        runs_per_owner: Limit for each owner; None means that only `runs` applies.
        of_owners: Limits by owner that replace `runs_per_owner`.
    """

    runs: int
    runs_per_owner: int | None
    of_owners: Mapping[str, int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Admission:
    """Whether a queued run starts; if not, `reason` says what it waits for."""

    run_id: str
    start: bool
    reason: str | None


def admit(
    queued: Sequence[QueuedRun], active: Sequence[ActiveRun], limits: RunLimits, cluster: ClusterCapacity | None
) -> list[Admission]:
    """Decide on every queued run.

    Args:
        queued: Queued runs in the order of the queue.
        active: All active runs.
        limits: Limits on active runs.
        cluster: Slots of the cluster; None if Ray does not answer.
    """
    owners = Counter(run.owner for run in active)
    claims = [resources for run in active for resources in run.claims]
    started: list[tuple[str, ...]] = []
    decided = []
    for run in queued:
        if run.held is not None:
            reason: str | None = run.held
        elif cluster is None:
            reason = "Ray does not answer"
        else:
            reason = _limit(run, owners, limits) or (None if cluster.grows else _room(run, claims, started, cluster))
        decided.append(Admission(run.run_id, reason is None, reason))
        if reason is None:
            owners[run.owner] += 1
            started += [need.resources for need in run.needs for _ in range(need.free)]
    return decided


def _limit(run: QueuedRun, owners: Mapping[str, int], limits: RunLimits) -> str | None:
    active, own = sum(owners.values()), owners.get(run.owner, 0)
    if active >= limits.runs:
        return f"{active} of {limits.runs} runs are active"
    most = limits.of_owners.get(run.owner, limits.runs_per_owner)
    if most is not None and own >= most:
        return f"owner {run.owner} has {own} of {most} runs active"
    return None


def _room(
    run: QueuedRun, claims: Sequence[tuple[str, ...]], started: Sequence[tuple[str, ...]], cluster: ClusterCapacity
) -> str | None:
    for need in run.needs:
        room = cluster.room(need.resources)
        if room.slots < max(need.slots, need.free):
            return _missing(need, room)
        # Ray's counts are a few seconds old: they may not include all active runs yet, and never those that start in
        # this round.
        free = min(room.free, room.slots - _claimed(claims, need)) - _claimed(started, need)
        if free < need.free:
            asked = f"; {room.pending} workers already wait" if room.pending else ""
            return f"waits for {need.free} {need.name}: {max(free, 0):g} of {room.slots:g} are free{asked}"
    return None


def _claimed(claims: Sequence[tuple[str, ...]], need: PoolNeed) -> int:
    """Number of slots in the need's pool that runs claim."""
    return sum(not set(resources).isdisjoint(need.resources) for resources in claims)


def _missing(need: PoolNeed, room: PoolRoom) -> str:
    if not room.slots:
        return f"no node offers {need.name}"
    return f"needs {need.slots} {need.name} at once; the nodes offer {room.slots:g}"
