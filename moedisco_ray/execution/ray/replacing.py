"""End running trainings, with a checkpoint, that finish sooner as a larger gang or on another machine."""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import Pool
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.event_mailbox import EventMailbox
from moedisco_ray.execution.ray.forecast import RESTART_SECONDS
from moedisco_ray.execution.ray.gang import GangSize
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.moving import worth_moving
from moedisco_ray.training import TrainJob

_LEAST_REPORTS = 2


@dataclasses.dataclass
class RunningAttempt:
    """A running attempt at a training.

    Attributes:
        pool: Node type of the workers.
        workers: Number of workers.
        before: Status of the training before the attempt; as long as the status stays equal, the attempt has reported
            nothing.
        end: Stop file with which only this attempt is ended, after a checkpoint, so that another one can replace it.
    """

    job: TrainJob
    pool: Pool
    workers: int
    before: UnitStatus
    end: StopFile


class Replacements:
    """Ends attempts that others should replace, and remembers which nodes a training has left.

    Args:
        mailbox: Carries the workers' events to the driver.
        gang: Decides the number of workers of a gang; None if each training has one worker, on a seat.
    """

    def __init__(self, mailbox: EventMailbox, gang: GangSize | None) -> None:
        self._mailbox = mailbox
        self._gang = gang
        self._left: dict[str, set[str]] = {}
        self._speeds: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._slow_at: dict[str, int] = {}

    def avoided(self, name: str, pool: Pool, running: Sequence[RunningAttempt], aside: Collection[str]) -> set[str]:
        """Ids of the nodes that a training has left because they are slow, as long as others have room."""
        left = self._left.get(name, set())
        has_room = left and self._has_room(pool, running, self._mailbox.statuses(_names(running)), {*aside, *left})
        return left if has_room else set()

    def end_slow(self, running: Sequence[RunningAttempt], *, waiting: bool, aside: Collection[str]) -> None:
        """End the attempts to replace.

        Args:
            running: All running attempts.
            waiting: Whether trainings wait for a slot. Then none moves, since a slow slot is better than none.
            aside: Ids of nodes on which no training starts.
        """
        if any(each.end.requested for each in running):
            return
        statuses = self._mailbox.statuses(_names(running))
        trained = [each for each in running if _has_trained(statuses[each.job.name], each.before)]
        if self._gang is not None:
            found = _growing(self._gang, trained, statuses)
        else:
            found = iter(()) if waiting else self._moving(running, trained, statuses, aside)
        for each, kind, reason in found:
            status = statuses[each.job.name]
            data = {"kind": kind, "step": status.step, "reason": reason}
            self._mailbox.push(Event("worker_restarted", each.job.stage, each.job.name, data))
            if kind == "moved":
                self._left[each.job.name] = {*status.nodes}
            each.end.request(kind)
            return

    def _moving(
        self,
        running: Sequence[RunningAttempt],
        trained: Sequence[RunningAttempt],
        statuses: Mapping[str, UnitStatus],
        aside: Collection[str],
    ) -> Iterator[tuple[RunningAttempt, str, str]]:
        """Trainings on slow nodes that have room elsewhere. Each moves once."""
        # By node type, since the speeds that a configuration states for types are only estimates. Those of trainings
        # that have ended are kept. The first report of an attempt is left out: it includes the start of its process.
        measured = [each for each in trained if statuses[each.job.name].reports >= _LEAST_REPORTS]
        for each in measured:
            self._speeds[each.pool.key][each.job.name] = statuses[each.job.name].step_seconds or 0.0
        for each in measured:
            name, status = each.job.name, statuses[each.job.name]
            others = [seconds for other, seconds in self._speeds[each.pool.key].items() if other != name]
            if name in self._left or not others:
                continue
            here, usual = status.step_seconds or 0.0, statistics.median(others)
            restart_seconds = status.start_seconds or RESTART_SECONDS
            if not worth_moving(each.job.steps - status.step, here, usual, restart_seconds):
                self._slow_at.pop(name, None)
                continue
            if self._slow_at.setdefault(name, status.reports) == status.reports:
                continue  # the next report must say so too
            others_running = [other for other in running if other is not each]
            if self._has_room(each.pool, others_running, statuses, {*aside, *status.nodes}):
                where = f"a step takes {here:.2g} s on this node, and {usual:.2g} s elsewhere"
                yield each, "moved", f"{where}; it continues on another node"

    def _has_room(
        self, pool: Pool, running: Sequence[RunningAttempt], statuses: Mapping[str, UnitStatus], avoided: set[str]
    ) -> bool:
        """Whether a slot of a node type is free, of this run and of others, on a node that is not avoided."""
        taken = [each for each in running if each.pool.key == pool.key]
        room = session.room(pool, avoided) > sum(avoided.isdisjoint(statuses[each.job.name].nodes) for each in taken)
        return room and session.free_workers(Placement(pool, 1, 0).bundle, avoided) > 0


def _growing(
    gang: GangSize, trained: Sequence[RunningAttempt], statuses: Mapping[str, UnitStatus]
) -> Iterator[tuple[RunningAttempt, str, str]]:
    """The gang, if a larger one would finish the training sooner."""
    for each in trained:
        status = statuses[each.job.name]
        seconds_left = (each.job.steps - status.step) * (status.step_seconds or 0.0)
        larger = gang.larger(each.workers, seconds_left, status.start_seconds or RESTART_SECONDS)
        if larger is not None:
            yield each, "grown", f"it continues with {larger} workers in place of {each.workers}"


def _names(running: Sequence[RunningAttempt]) -> list[str]:
    return [each.job.name for each in running]


def _has_trained(status: UnitStatus, before: UnitStatus) -> bool:
    return bool(status.step and status.step_seconds) and status != before
