"""Simulates a phase: machines boot, are lost and return; sub-models start, save, are set back and finish."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.study.simulation.expensive import Gang
from benchmarks.study.simulation.setting import HOUR, Kind, Setting, submodels
from benchmarks.study.simulation.state import Attempt, Node, Outcome, Unit
from moedisco_ray.policies import checkpointing, ordering, placement, retrying

_TICK, _SELDOM = 60.0, 1800.0


class Phase:
    """One simulation of a setting.

    Args:
        setting: Scenario to simulate.
        seed: Random seed; equal seeds give the same sub-models in all settings.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        self._setting = setting
        self._rng = random.Random(f"events {seed}")
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._units = {work.name: Unit(work, retrying.History(8)) for work in submodels(setting, seed)}
        self._waiting = list(self._units)
        self._nodes: dict[Node, None] = {}  # an ordered set, so that equal seeds give equal runs
        self._free = {kind.name: kind.machines for kind in setting.kinds}
        self._gang = Gang(setting, random.Random(f"gang {seed}"))
        self._paid = self._lost = self._watched = 0.0
        self._losses = self._costly = 0
        self._boots: list[float] = []
        self._factor = 1.0
        self._over = False

    def run(self) -> Outcome:
        """Simulate until the merge can start."""
        self._dispatch()
        self._at(0.0, self._tick)
        if self._setting.together and self._setting.losses_per_hour:
            for zone in range(self._setting.zones):
                self._at(self._next_of_zone(), self._lose_zone, zone)
        while not self._over:
            self._now, _, happen, arguments = heapq.heappop(self._events)
            happen(*arguments)
        for node in list(self._nodes):
            self._release(node)
        works = [unit.work for unit in self._units.values()]
        cheapest = min(kind.price / kind.speed for kind in self._setting.kinds)
        machines = min(self._setting.at_once, sum(kind.machines for kind in self._setting.kinds))
        return Outcome(
            self._now,
            self._paid,
            makespan_bound([work.seconds for work in works], machines),
            sum(work.seconds for work in works) / HOUR * cheapest,
            self._losses,
            self._lost / HOUR,
            sum(unit.state == "finished" for unit in self._units.values()),
            *self._gang.end(self._now),
        )

    def _at(self, delay: float, happen: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._events, (self._now + delay, next(self._numbers), happen, arguments))

    # Machines.

    def _dispatch(self) -> None:
        """Start the sub-models that have a machine, request machines for the others, and release those without work."""
        for name in self._order():
            unit = self._units[name]
            idle = {kind.name: self._idle(kind) for kind in self._setting.kinds}
            chosen = self._place(unit, {kind: len(nodes) for kind, nodes in idle.items()})
            if chosen is None:
                if not any(idle.values()):
                    break
                continue
            self._start(unit, idle[chosen][0])
        booting = sum(not node.up for node in self._nodes)
        for name in self._waiting[booting:]:
            chosen = self._place(self._units[name], self._free) if len(self._nodes) < self._setting.at_once else None
            if chosen is not None:
                self._boot(next(kind for kind in self._setting.kinds if kind.name == chosen))
        if not self._waiting:
            for node in [node for node in self._nodes if node.unit is None and not node.leaving]:
                self._release(node)

    def _idle(self, kind: Kind) -> list[Node]:
        return [
            node for node in self._nodes if node.up and not node.leaving and node.unit is None and node.kind is kind
        ]

    def _order(self) -> list[str]:
        if self._setting.order == "longest_first" and len(self._waiting) > 1:
            waiting = [self._units[name].remaining for name in self._waiting]
            running = [unit.attempt.left(self._now) for unit in self._units.values() if unit.attempt is not None]
            slots = sum(node.up and not node.leaving for node in self._nodes)
            self._waiting = [unit.name for unit in ordering.soonest_done(waiting, running, slots, self._factor)]
        return list(self._waiting)

    def _measure(self, unit: Unit, attempt: Attempt) -> None:
        """Record the measured step time; all units, including finished ones, correct the plan."""
        if unit.measured is None:
            unit.measured = unit.work.step_seconds / attempt.speed
            self._factor = ordering.calibration([unit.remaining for unit in self._units.values()])

    def _place(self, unit: Unit, free: dict[str, int]) -> str | None:
        types = [placement.NodeType(k.name, k.memory_gb, k.price, k.speed, free[k.name]) for k in self._setting.kinds]
        chosen = placement.place(placement.Need(unit.work.name, unit.work.memory_gb), types)
        return chosen.name if chosen is not None else None

    def _boot(self, kind: Kind) -> None:
        node = Node(kind, self._rng.randrange(self._setting.zones), self._now)
        self._nodes[node] = None
        self._free[kind.name] -= 1
        self._at(self._setting.boot * self._rng.lognormvariate(0.0, 0.4), self._arrive, node)

    def _arrive(self, node: Node) -> None:
        if node.gone:
            return
        node.up = True
        self._boots.append(self._now - node.since)
        if self._setting.losses_per_hour and not self._setting.together:
            self._announce(self._rng.expovariate(self._setting.losses_per_hour / HOUR), node)
        self._dispatch()

    def _announce(self, delay: float, node: Node) -> None:
        """Schedule the loss of a machine, and its notice if it is heard."""
        if self._rng.random() < self._setting.heard:
            self._at(max(0.0, delay - self._setting.notice), self._leave, node)
        self._at(delay, self._lose, node)

    def _leave(self, node: Node) -> None:
        """React to the notice: save a checkpoint, and continue on another machine."""
        unit = node.unit
        if node.gone or unit is None or unit.attempt is None:
            return
        if self._setting.latency <= self._setting.notice:
            unit.safe = unit.attempt.done(self._now)
            self._losses += 1
            self._stop(unit, retrying.End("preempted", 0, "notice"), self._setting.latency)
            node.leaving = True  # takes no more work, and is paid for until it is gone

    def _lose(self, node: Node) -> None:
        if node.gone:
            return
        if node.unit is not None:
            self._losses += 1
            self._costly += 1
            self._throw_back(node.unit, "preempted")
        self._release(node, back=False)
        self._at(self._rng.expovariate(1 / (self._setting.outage_hours * HOUR)), self._restock, node.kind.name)
        self._dispatch()

    def _next_of_zone(self) -> float:
        rate = self._setting.losses_per_hour / HOUR / self._setting.together
        return self._rng.expovariate(rate)

    def _lose_zone(self, zone: int) -> None:
        for node in [node for node in self._nodes if node.up and node.zone == zone]:
            if self._rng.random() < self._setting.together:
                self._announce(self._setting.notice, node)
        self._at(self._next_of_zone(), self._lose_zone, zone)

    def _restock(self, kind: str) -> None:
        self._free[kind] += 1
        self._dispatch()

    def _release(self, node: Node, *, back: bool = True) -> None:
        node.gone = True
        del self._nodes[node]
        self._paid += (self._now - node.since) / HOUR * node.kind.price
        if back:
            self._free[node.kind.name] += 1

    # Sub-models.

    def _start(self, unit: Unit, node: Node) -> None:
        self._waiting.remove(unit.work.name)
        node.unit = unit
        self._train(
            unit,
            Attempt(
                node,
                self._now + self._setting.restart,
                unit.safe,
                unit.safe,
                unit.work.seconds,
                node.kind.speed,
                self._interval(),
                self._setting.stall,
                self._setting.latency,
            ),
        )

    def _train(self, unit: Unit, attempt: Attempt) -> None:
        unit.attempt = attempt
        self._at(attempt.ends - self._now, self._finish, unit, attempt)
        if attempt.review < attempt.ends - self._setting.latency:
            self._at(attempt.review - self._now, self._review, unit, attempt)
        if self._setting.failures_per_hour:
            self._at(self._rng.expovariate(self._setting.failures_per_hour / HOUR), self._fail, unit, attempt)

    def _review(self, unit: Unit, attempt: Attempt) -> None:
        if unit.attempt is attempt:
            self._watched += self._now - attempt.begins
            self._train(
                unit,
                dataclasses.replace(
                    attempt,
                    begins=self._now,
                    start=attempt.done(self._now),
                    safe=attempt.saved(self._now),
                    interval=self._interval(),
                ),
            )

    def _rate(self) -> float:
        running = sum(self._now - unit.attempt.begins for unit in self._units.values() if unit.attempt is not None)
        return checkpointing.loss_rate(self._costly, (self._watched + running) / HOUR, self._setting.prior)

    def _interval(self) -> float:
        if self._setting.every is not None:
            return max(self._setting.every, self._setting.latency)
        cost = checkpointing.SaveCost(self._setting.stall, self._setting.latency)
        return checkpointing.interval(cost, self._rate(), 1, self._setting.bounds)

    def _stop(self, unit: Unit, end: retrying.End, delay: float) -> None:
        """End an attempt; the product's policy decides what follows."""
        attempt = unit.attempt
        assert attempt is not None  # noqa: S101 - for mypy
        self._watched += max(0.0, self._now - attempt.begins)
        if self._now > attempt.begins:
            self._measure(unit, attempt)
        attempt.node.unit = None
        unit.attempt = None
        decision = retrying.decide(unit.history, end, (), retrying.Limits())
        if isinstance(decision, retrying.GiveUp):
            unit.state = "given_up"
            self._judge()
            return
        unit.history = decision.history
        self._at(delay, self._wait, unit)

    def _wait(self, unit: Unit) -> None:
        self._waiting.append(unit.work.name)
        self._dispatch()

    def _throw_back(self, unit: Unit, kind: retrying.EndKind) -> None:
        attempt = unit.attempt
        assert attempt is not None  # noqa: S101 - for mypy
        done = attempt.done(self._now)
        unit.safe = attempt.saved(self._now)
        self._lost += (done - unit.safe) / attempt.speed
        self._stop(unit, retrying.End(kind, int(done / unit.work.step_seconds), kind), 0.0)

    def _fail(self, unit: Unit, attempt: Attempt) -> None:
        if unit.attempt is attempt:
            self._throw_back(unit, "failed")

    def _finish(self, unit: Unit, attempt: Attempt) -> None:
        if unit.attempt is not attempt:
            return
        self._watched += self._now - attempt.begins
        self._measure(unit, attempt)
        unit.safe, unit.attempt, unit.state = unit.work.seconds, None, "finished"
        attempt.node.unit = None
        self._dispatch()
        self._judge()

    # The end of the phase.

    def _judge(self) -> None:
        self._over = all(unit.state != "training" for unit in self._units.values())

    def _tick(self) -> None:
        left = self._gang.consider(self._now, self._boots, self._ends_in)
        # Far from the end no decision is due, so ticks are rare.
        self._at(min(_SELDOM, max(_TICK, left / 10)), self._tick)

    def _ends_in(self) -> tuple[list[float], list[float], int, float]:
        """Inputs for the product's prediction of the end.

        Returns:
            Seconds left of running units, seconds left of waiting units, number of slots, and the stretch by losses.
        """
        units = self._units.values()
        running = [unit.attempt.left(self._now) for unit in units if unit.attempt is not None]
        waiting = [ordering.expected_seconds(self._units[name].remaining, self._factor) for name in self._waiting]
        rate = self._rate()
        overhead = self._setting.restart + self._setting.boot
        stretch = checkpointing.expected_stretch(self._interval(), self._setting.stall, HOUR / rate, overhead)
        return running, waiting, max(len(running), min(self._setting.at_once, len(running) + len(waiting))), stretch


def makespan_bound(seconds: Sequence[float], slots: int) -> float:
    """Lower bound of the makespan in seconds: the longest unit, or all work divided evenly among the slots."""
    return max(max(seconds, default=0.0), sum(seconds) / slots)
