"""Progress of the sub-models towards the quorum: which finished or gave up, when, and what each adds to the merge.

A run that is interrupted continues with another driver. Times count the seconds in which any driver of the run was
running. Each driver stores the progress in `submodel_progress.json`, next to the checkpoints, and the next driver
continues from these files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.backend import Trained
from moedisco_ray.core.errors import DivergedError, StorageError, TrainingError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.policies.ordering import Remaining, calibration
from moedisco_ray.policies.quorum import Member, Quorum, State, Verdict, contribution, decide
from moedisco_ray.training import TrainJob, TrainResult, read_partial_result

_SAVE_SECONDS = 10.0
"""Minimum time between two saves, in seconds. If a driver dies, the progress since its last save is lost."""

Held = Mapping[str, Mapping[str, float]]
"""Worker-seconds by name of the training, then by pool (`Pool.key`)."""


class SubmodelProgress:
    """Progress of a group of trainings, over all drivers of the run.

    Args:
        jobs: The trainings, including those that an earlier driver finished.
        quorum: Number of trainings that must finish, and how long to wait for the others.
        workers: Number of workers of each training before its first attempt.
        path: File that stores the progress; its directory must exist.
        clock: Returns the current time in seconds.

    Attributes:
        finished: Results of the finished trainings, by name.
        workers: Number of workers of the newest attempt at each training, by name.
    """

    def __init__(
        self,
        jobs: Sequence[TrainJob],
        quorum: Quorum,
        workers: int,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._quorum = quorum
        self.workers = dict.fromkeys((job.name for job in jobs), workers)
        self._path = path
        self._clock = clock
        kept: dict[str, Any] = (
            read_json(path) if path.exists() else {"seconds": 0.0, "ended": {}, "speeds": {}, "held": {}, "walls": {}}
        )
        self._held_before: Held = kept["held"]
        self._walls: dict[str, float] = kept["walls"]
        self._counted = {unit: sum(held.values()) for unit, held in self._held_before.items()}
        self._ended: dict[str, float] = kept["ended"]
        self._speeds: dict[str, float] = kept["speeds"]
        self._began = clock() - kept["seconds"]
        self._saved_at = clock()
        self._given_up: dict[str, str] = {}
        self._diverged = False
        self.finished: dict[str, TrainResult] = {}
        for job in jobs:
            result = read_partial_result(job)
            if result.finished:
                self.finish(job.name, result, self._speeds.get(job.name, 1.0))

    @property
    def seconds(self) -> float:
        """Seconds for which any driver of the run has been running since the group started."""
        return self._clock() - self._began

    def finish(self, name: str, result: TrainResult, speed: float) -> None:
        """Record that a training has finished, and the relative speed of its machine."""
        self.finished[name] = result
        self._speeds[name] = speed
        self._ended.setdefault(name, self.seconds)

    def give_up(self, name: str, reason: str, *, diverged: bool = False) -> None:
        """Record that this driver no longer retries a training, and whether its loss diverged."""
        self._given_up[name] = reason
        self._diverged = self._diverged or diverged

    def verdict(self, speeds: Mapping[str, float]) -> Verdict:
        """Whether to wait, or to continue with the trainings that have finished.

        The expected time of a training is computed from its steps, the times of the finished trainings and its
        machine's speed. So a training on a slow machine gets more time, but one that is slow for another reason does
        not.

        Args:
            speeds: Relative speed of the machine of each unfinished training. For a training that waits for a machine,
                it is the speed of a machine that the training may get.

        Raises:
            TrainingError: Too many trainings were given up to reach the quorum.
        """
        known = {**speeds, **self._speeds}
        units = [
            Remaining(job.name, job.steps, 1 / known[job.name], self._step_seconds(job.name)) for job in self._jobs
        ]
        factor = calibration(units)
        members = [
            Member(
                unit.name, self._state(unit.name), self._ended.get(unit.name, 0.0), unit.steps * unit.planned * factor
            )
            for unit in units
        ]
        verdict = decide(members, self._quorum.needed, self.seconds, self._quorum.patience)
        if verdict.action == "fail":
            needed = self._quorum.needed
            beginning = "" if needed is None else f"{needed} of {len(units)} can no longer finish: "
            kind = DivergedError if self._diverged else TrainingError
            raise kind(beginning + "; ".join(f"{name}: {reason}" for name, reason in self._given_up.items()))
        return verdict

    def trained(self, job: TrainJob, held: Held) -> Trained:
        """The result of a training so far, given the worker-seconds that this driver used."""
        total = self._count(held).get(job.name, {})
        seconds = self._walls.get(job.name, 0.0)
        if job.name in self.finished:
            return Trained(self.finished[job.name], seconds, total)
        result = dataclasses.replace(read_partial_result(job), finished=False)
        member = Member(job.name, self._state(job.name), checkpoint=result.steps)
        reason = self._given_up.get(job.name, "its time was up")
        return Trained(result, seconds, total, contribution(member), reason)

    def save(self, held: Callable[[], Held], *, now: bool = False) -> None:
        """Save the progress for the next driver, unless the last save was less than `_SAVE_SECONDS` ago.

        Args:
            held: Returns the worker-seconds that this driver used.
            now: Whether to save even if the last save is recent.
        """
        if now or self._clock() - self._saved_at >= _SAVE_SECONDS:
            self._saved_at = self._clock()
            write_json(
                self._path,
                {
                    "seconds": self.seconds,
                    "ended": self._ended,
                    "speeds": self._speeds,
                    "held": self._count(held()),
                    "walls": self._walls,
                },
            )
            with contextlib.suppress(StorageError):  # not fatal: the next save tries again
                self._jobs[0].store.publish(self._path)

    def _count(self, held: Held) -> dict[str, dict[str, float]]:
        """Worker-seconds of each training and pool, over all drivers.

        The increase since the last call, divided by the number of workers, is added to the wall-clock time of each
        training.
        """
        units = dict.fromkeys([*self._held_before, *held])
        totals: dict[str, dict[str, float]] = {
            unit: dict(Counter(self._held_before.get(unit, {})) + Counter(held.get(unit, {}))) for unit in units
        }
        for unit, pools in totals.items():
            total = sum(pools.values())
            self._walls[unit] = self._walls.get(unit, 0.0) + (total - self._counted.get(unit, 0.0)) / self.workers.get(
                unit, 1
            )
            self._counted[unit] = total
        return totals

    def _state(self, name: str) -> State:
        if name in self.finished:
            return "finished"
        return "given_up" if name in self._given_up else "training"

    def _step_seconds(self, name: str) -> float | None:
        result = self.finished.get(name)
        return None if result is None else result.seconds / result.steps
