"""Kills the process of a seat at a planned moment of a training that it runs, or is about to run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Literal

from moedisco_ray.core.records.events import Event

Moment = Literal["idle", "handover", "step", "save"]
"""`idle`: between two trainings. `handover`: the driver has taken the seat for a training, whose first step is not
reported. `step`: while it trains. `save`: while it writes a checkpoint."""
Store = Literal["disk", "throttle", "cut", "refuse", "slow"]
"""Where checkpoints go: to a disk, or to an object store with a fault."""

_LATEST_HANDOVER = 0.5
_WATCH_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        moment: When.
        step: After which step, of a kill at a step or while a checkpoint is written.
        delay: Seconds from taking the seat, of a kill at a handover.
    """

    moment: Moment
    step: int = 0
    delay: float = 0.0

    def __str__(self) -> str:
        when = {"handover": f" + {self.delay:.2f} s", "idle": ""}
        return self.moment + when.get(self.moment, f" after step {self.step}")


def draw(seed: int, units: int, steps: int) -> tuple[Store, list[Kill | None]]:
    """The store, and for each of the trainings on one seat a kill or none; there is always one."""
    generator = random.Random(seed)
    store: Store = generator.choice(["disk", "disk", "throttle", "cut", "refuse", "slow"])
    kills: list[Kill | None] = []
    for unit in range(units):
        possible: list[Moment] = ["step", "save"] if unit == 0 else ["idle", "handover", "step", "save"]
        kill = Kill(
            generator.choice(possible), generator.randint(1, steps * 3 // 4), generator.uniform(0.0, _LATEST_HANDOVER)
        )
        kills.append(kill if generator.random() < 0.75 else None)
    if not any(kills):
        kills[-1] = Kill("handover", delay=generator.uniform(0.0, _LATEST_HANDOVER))
    return store, kills


class SeatKiller:
    """A listener of the trainings' events that kills the seat once for each planned kill.

    Args:
        kills: By name of the training.
        saving: Whether a training writes a checkpoint now.
    """

    def __init__(self, kills: dict[str, Kill], saving: Callable[[str], bool]) -> None:
        self._kills = kills
        self._saving = saving
        self._pid: int | None = None
        self._unit = ""
        self.events: list[Event] = []
        self.done: list[str] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        unit = event.data.get("unit") if event.type == "workers_held" else event.unit
        kill = self._kills.get(unit or "")
        if event.type == "unit_started":
            self._pid, self._unit = event.data["pid"], event.unit or ""
        if kill is None or unit is None:
            return
        if kill.moment == "handover" and event.type == "workers_held":
            time.sleep(kill.delay)
            self.kill(unit)
        elif event.type == "progress" and event.data["step"] >= kill.step:
            if kill.moment == "step":
                self.kill(unit)
            elif kill.moment == "save":
                self._kills.pop(unit)
                threading.Thread(target=self._kill_while_saving, args=(unit, self._pid), daemon=True).start()

    def kill(self, unit: str) -> None:
        """Kill the seat's process, for this training; the seat is the one that trained last."""
        self._kills.pop(unit, None)
        self._end(unit, self._pid)

    def _kill_while_saving(self, unit: str, pid: int | None) -> None:
        deadline = time.monotonic() + _WATCH_SECONDS
        while not self._saving(unit) and time.monotonic() < deadline:
            time.sleep(0.0005)
        if unit == self._unit and pid == self._pid:
            self._end(unit, pid)

    def _end(self, unit: str, pid: int | None) -> None:
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.done.append(unit)
