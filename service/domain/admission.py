"""Which queued runs start now, and what the others wait for.

The queue is taken in its order. A run that waits for its owner's limit or for machines that do not exist lets others pass;
one that waits for a free slot does not lose it to a later one, since every run asks for one slot to begin with.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class PoolNeed:
    """What a run asks of a pool.

    Attributes:
        resources: The pool's tag; of a mixed pool, those of its node types, any of which will do.
        slots: That must exist, busy or not: a gang runs whole or not at all.
        free: Of those, free to begin with.
    """

    resources: tuple[str, ...]
    slots: int
    free: int

    @property
    def name(self) -> str:
        """For people."""
        return " or ".join(self.resources)


@dataclasses.dataclass(frozen=True)
class QueuedRun:
    """A run that waits."""

    run_id: str
    owner: str
    needs: tuple[PoolNeed, ...]
    held: str | None = None
    """Why it may not start, whatever room there is."""


@dataclasses.dataclass(frozen=True)
class ActiveRun:
    """A run that has, or may have, a driver.

    Attributes:
        owner: Whose.
        claims: Of each pool in which it holds, or is about to hold, a slot: its tags.
    """

    owner: str
    claims: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class PoolRoom:
    """A pool as Ray tells of it, some seconds ago.

    Attributes:
        slots: Workers there is room for.
        free: Of those, not in use.
        pending: Workers that wait for a slot already.
    """

    slots: float
    free: float
    pending: int = 0


@dataclasses.dataclass(frozen=True)
class ClusterCapacity:
    """What Ray has.

    Attributes:
        rooms: By tag.
        grows: An autoscaler may bring what is missing.
    """

    rooms: Mapping[str, PoolRoom]
    grows: bool = False

    def room(self, resources: tuple[str, ...]) -> PoolRoom:
        """In a pool of such tags, all together."""
        rooms = [self.rooms.get(resource, PoolRoom(0, 0)) for resource in resources]
        return PoolRoom(sum(room.slots for room in rooms), sum(room.free for room in rooms), sum(room.pending for room in rooms))


@dataclasses.dataclass(frozen=True)
class RunLimits:
    """Most active runs.

    Attributes:
        runs: Of all owners together.
        runs_per_owner: Of one owner; None: no limit but that of all together.
        of_owners: By owner, in place of `runs_per_owner`.
    """

    runs: int
    runs_per_owner: int | None
    of_owners: Mapping[str, int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Admission:
    """What becomes of a queued run: it starts, or `reason` says what it waits for."""

    run_id: str
    start: bool
    reason: str | None


def admit(
    queued: Sequence[QueuedRun], active: Sequence[ActiveRun], limits: RunLimits, cluster: ClusterCapacity | None,
) -> list[Admission]:
    """Decide on every queued run.

    Args:
        queued: In the queue's order.
        active: All of them.
        limits: Most active runs, altogether and of one owner.
        cluster: None: Ray does not answer.
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
    run: QueuedRun, claims: Sequence[tuple[str, ...]], started: Sequence[tuple[str, ...]], cluster: ClusterCapacity,
) -> str | None:
    for need in run.needs:
        room = cluster.room(need.resources)
        if room.slots < max(need.slots, need.free):
            return _missing(need, room)
        # Ray's figures are some seconds old: an active run may hold its slot in them or not, a run started in this pass does not.
        claimed, new = (
            sum(not set(resources).isdisjoint(need.resources) for resources in those) for those in (claims, started))
        free = min(room.free, room.slots - claimed) - new
        if free < need.free:
            asked = f"; {room.pending} workers wait already" if room.pending else ""
            return f"waits for {need.free} {need.name}: {max(free, 0):g} of {room.slots:g} are free{asked}"
    return None


def _missing(need: PoolNeed, room: PoolRoom) -> str:
    if not room.slots:
        return f"no node offers {need.name}"
    return f"needs {need.slots} {need.name} at once; the nodes offer {room.slots:g}"
