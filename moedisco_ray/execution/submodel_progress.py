"""Trainings that end together: who has finished, who gave up, after how long, and what each gives to what follows.

Times count only while a driver is running (s), over all drivers of a run. `submodel_progress.json`, next to the checkpoints, holds
what a driver has learned; a later driver decides anew from that file and from the checkpoints.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.backend import Trained
from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.errors import DivergedError, TrainingError
from moedisco_ray.policies import quorum
from moedisco_ray.policies.ordering import Remaining, calibration
from moedisco_ray.policies.quorum import Member, Quorum, State, Verdict
from moedisco_ray.training import TrainJob, TrainResult, read_partial_result

_SAVE_SECONDS = 10.0
"""Between two notes; what a driver knew beyond the last one is lost with it."""

Held = Mapping[str, Mapping[str, float]]
"""Worker-seconds per unit, and for each by what the meter calls its machines."""


class SubmodelProgress:
    """How a submodel_progress stands, over all drivers.

    Args:
        jobs: Of the submodel_progress. One that an earlier driver finished is known as such.
        waits_for: When it may end without some of them.
        workers: Of each training.
        path: Where the notes lie; its directory exists.
        clock: Seconds.
    """

    def __init__(
        self, jobs: Sequence[TrainJob], waits_for: Quorum, workers: int, path: Path, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._jobs = jobs
        self._waits_for = waits_for
        self._workers = workers
        self._path = path
        self._clock = clock
        kept: dict[str, Any] = read_json(path) if path.exists() else {"seconds": 0.0, "ended": {}, "speeds": {}, "held": {}}
        self._held_before: Held = kept["held"]
        self._ended: dict[str, float] = kept["ended"]
        self._speeds: dict[str, float] = kept["speeds"]
        self._began = clock() - kept["seconds"]
        self._saved = clock()
        self._given_up: dict[str, str] = {}
        self._diverged = False
        self.finished: dict[str, TrainResult] = {}
        for job in jobs:
            result = read_partial_result(job)
            if result.finished:
                self.finish(job.name, result, self._speeds.get(job.name, 1.0))

    @property
    def seconds(self) -> float:
        """For which it has lasted."""
        return self._clock() - self._began

    def finish(self, name: str, result: TrainResult, speed: float) -> None:
        """A training has made all its steps, on a machine of this speed."""
        self.finished[name] = result
        self._speeds[name] = speed
        self._ended.setdefault(name, self.seconds)

    def give_up(self, name: str, reason: str, *, diverged: bool = False) -> None:
        """Note that this driver does not try a training again, and whether the training itself is to blame."""
        self._given_up[name] = reason
        self._diverged = self._diverged or diverged

    def verdict(self, speeds: Mapping[str, float]) -> Verdict:
        """Whether to wait, or to go on with what is there.

        What one is expected to take follows from those that have finished, and its machine's speed: one that is slow for no known
        reason is what is not waited for.

        Args:
            speeds: Of the machines that the others are on, or might go to; relative to anything that is the same for all.

        Raises:
            TrainingError: So many gave up that nothing is worth waiting for.
        """
        known = {**speeds, **self._speeds}
        units = [Remaining(job.name, job.steps, 1 / known[job.name], self._step_seconds(job.name)) for job in self._jobs]
        factor = calibration(units)
        members = [
            Member(unit.name, self._state(unit.name), self._ended.get(unit.name, 0.0), unit.steps * unit.planned * factor)
            for unit in units]
        verdict = quorum.decide(members, self._waits_for.needed, self.seconds, self._waits_for.patience)
        if verdict.action == "fail":
            needed = self._waits_for.needed
            beginning = "" if needed is None else f"{needed} of {len(units)} can no longer finish: "
            kind = DivergedError if self._diverged else TrainingError
            raise kind(beginning + "; ".join(f"{name}: {reason}" for name, reason in self._given_up.items()))
        return verdict

    def trained(self, job: TrainJob, held: Held) -> Trained:
        """A job as it has ended, or stands.

        Args:
            job: One of the submodel_progress.
            held: By this driver so far.
        """
        total = self._held(held).get(job.name, {})
        seconds = sum(total.values()) / self._workers
        if job.name in self.finished:
            return Trained(self.finished[job.name], seconds, total)
        result = dataclasses.replace(read_partial_result(job), finished=False)
        member = Member(job.name, self._state(job.name), checkpoint=result.steps)
        reason = self._given_up.get(job.name, "its time was up")
        return Trained(result, seconds, total, quorum.contribution(member), reason)

    def note(self, held: Callable[[], Held], *, now: bool = False) -> None:
        """Write down what a later driver must know, every few seconds.

        Args:
            held: Tells what this driver held so far.
            now: However short a while ago the last time was.
        """
        if now or self._clock() - self._saved >= _SAVE_SECONDS:
            self._saved = self._clock()
            write_json(self._path, {
                "seconds": self.seconds, "ended": self._ended, "speeds": self._speeds, "held": self._held(held())})

    def _held(self, held: Held) -> dict[str, dict[str, float]]:
        units = dict.fromkeys([*self._held_before, *held])
        return {unit: dict(Counter(self._held_before.get(unit, {})) + Counter(held.get(unit, {}))) for unit in units}

    def _state(self, name: str) -> State:
        if name in self.finished:
            return "finished"
        return "given_up" if name in self._given_up else "training"

    def _step_seconds(self, name: str) -> float | None:
        result = self.finished.get(name)
        return None if result is None else result.seconds / result.steps
