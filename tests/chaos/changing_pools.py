"""Carries a plan out during the run that it disturbs, and knows the effect that each change must have."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from pool_plan import Change
from spot_nodes import SpotNodes

from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile

T = TypeVar("T")

NOTICE_SECONDS = 20.0
"""Between a notice and the power going; a trainer looks for one every second."""
_PATIENCE = 400.0


@dataclasses.dataclass(frozen=True)
class Hit:
    """A unit that a change happened to.

    Attributes:
        unit: Its name.
        change: What happened.
    """

    unit: str
    change: Change


@dataclasses.dataclass
class _Trainer:
    stage: str
    node: str
    pid: int
    step: int = 0
    steps: int = 0
    struck: bool = False


class ChangingPools:
    """A listener of a run's events, and what acts on them.

    Args:
        plan: What to do.
        nodes: The cluster.
        resources: Of each stage's pool.
        steps: Of each stage, over all its units.

    """

    def __init__(
        self, plan: Sequence[Change], nodes: SpotNodes, resources: Mapping[str, str], steps: Mapping[str, int]
    ) -> None:
        self._hits: list[tuple[Hit, _Trainer]] = []
        self._finished: dict[str, _Trainer] = {}
        self._plan = plan
        self._nodes = nodes
        self._resources = resources
        self._steps = steps
        self._made: dict[str, dict[str, int]] = {stage: {} for stage in resources}
        self._trainers: dict[str, _Trainer] = {}
        self._changed = threading.Condition()
        self._ended = threading.Event()

    @property
    def hits(self) -> list[Hit]:
        """What was done to units that were running, without what happened when a unit had ended or was given notice."""
        return [hit for hit, trainer in self._hits if self._finished.get(hit.unit) is not trainer]

    def __call__(self, event: Event) -> None:
        with self._changed:
            if event.unit is not None and event.stage in self._made:
                self._take(event.stage, event.unit, event)
            self._changed.notify_all()

    def disturb(self, run: Callable[[], T], stop: StopFile) -> T:
        """Carry the whole plan out while a run continues in another thread; Ray wants the main thread to start nodes.

        Args:
            run: The run.
            stop: Ends it, if the plan cannot be carried out.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="run") as thread:
            running = thread.submit(run)
            running.add_done_callback(self._end)
            try:
                for change in self._plan:
                    self._wait_for(lambda change=change: self._due(change) or self._too_late(change))
                    if self._due(change):
                        self._carry_out(change)
            except BaseException:
                if running.done():
                    running.result()
                stop.request("its pools could not be changed as planned")
                raise
            return running.result()

    def _end(self, _: Future[Any]) -> None:
        self._ended.set()
        with self._changed:
            self._changed.notify_all()

    def _take(self, stage: str, unit: str, event: Event) -> None:
        if event.type == "unit_started":
            self._trainers[unit] = _Trainer(stage, event.data["node_id"], event.data["pid"], steps=event.data["steps"])
        elif event.type in ("unit_finished", "worker_restarted"):
            trainer = self._trainers.pop(unit, None)
            if trainer is not None and event.type == "unit_finished":
                self._finished[unit] = trainer
        elif event.type == "progress":
            made = self._made[stage]
            made[unit] = max(made.get(unit, 0), event.data["step"])
            if unit in self._trainers:
                self._trainers[unit].step = event.data["step"]

    def _due(self, change: Change) -> bool:
        made = sum(self._made[change.stage].values())
        return made >= change.share * self._steps[change.stage] and bool(self._under_way(change.stage))

    def _too_late(self, change: Change) -> bool:
        """Whether a notice before it has let the last training of its stage finish, which is what a notice is for."""
        noticed = [
            hit
            for hit, trainer in self._hits
            if hit.change.kind == "notice" and self._finished.get(hit.unit) is trainer
        ]
        made = sum(self._made[change.stage].values())
        return made == self._steps[change.stage] and any(hit.change.stage == change.stage for hit in noticed)

    def _under_way(self, stage: str) -> list[str]:
        """Units that train now, and that nothing happened to yet; the one with most left first."""
        mine = {
            unit: trainer
            for unit, trainer in self._trainers.items()
            if trainer.stage == stage and trainer.step and not trainer.struck
        }
        return sorted(mine, key=lambda unit: mine[unit].step - mine[unit].steps)

    def _carry_out(self, change: Change) -> None:
        resource = self._resources[change.stage]
        if change.kind == "arrival":
            self._nodes.add(resource)
            return
        with self._changed:
            units = self._under_way(change.stage)
            unit = units[change.pick % len(units)]
            struck = units if change.kind == "empty" else [unit]
            for name in struck:
                self._trainers[name].struck = True
                self._hits.append((Hit(name, change), self._trainers[name]))
            trainer = self._trainers[unit]
        if change.kind == "process":
            os.kill(trainer.pid, signal.SIGKILL)
            return
        going = self._nodes.of(resource) if change.kind == "empty" else [trainer.node]
        if change.kind == "notice":
            self._nodes.notify(trainer.node, NOTICE_SECONDS)
            self._wait_for(lambda: self._trainers.get(unit) is not trainer, NOTICE_SECONDS)
        for node in going:
            self._nodes.kill(node)
        if change.absence is not None:
            self._ended.wait(change.absence)
            for _ in going:
                self._nodes.add(resource)

    def _wait_for(self, condition: Callable[[], Any], seconds: float = _PATIENCE) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition() or self._ended.is_set(), seconds), (
                "the run got no further"
            )
            assert condition(), "the run ended before its pools had changed as planned"
