"""The planned time of streamed training: per published checkpoint and machine, and against throttled copies here.

The plan assumes that every card reaches the same share of its peak, in training and in Muon's arithmetic. A faster card
hides less copying, so the share is that of good kernels.

For the check, three threads handle the tasks of a step as the card's engines would, with two places for inputs and for
results. A copy sleeps for its bytes divided by the speed, a few milliseconds at a time, because its speed depends on
whether there are copies in the other direction. Arithmetic sleeps too.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import environment, spread, write_result
from docs.plans import CHECKPOINTS
from moedisco_ray.core.cards import CARDS, Card
from moedisco_ray.core.config import Optimizer
from moedisco_ray.plan.streaming import (
    DIVISIONS,
    Host,
    StepTime,
    Work,
    best_step,
    step_between_hosts,
    step_tasks,
    step_time,
    step_work,
)
from moedisco_ray.plan.timeline import PLACES, Link, Task, timeline

SHAPES = ("Qwen1.5-MoE-A2.7B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "gpt-oss-20b")
UTILISATION = 0.4
"""Share of a card's peak that its products reach."""
SEQUENCE = 1024
LEAST, GOAL = 0.85, 0.95
"""Share of the speed without copies from which streaming is planned, and that it should reach."""
BOX, BOX_TOKENS, TOKENS = 8, 524_288, 65_536
NETWORKS = {"1 Gbit/s": 0.125e9, "10 Gbit/s": 1.25e9}
HOSTS = (2, 4)
KEPT = 0.5
"""Share of a card's memory that weights may take that stay there."""
CHECKED_LAYERS, ROUNDS, SECONDS = 6, 3, 20.0
"""Layers of the model of the check, its rounds, and the planned seconds of each step."""
_SLEEP = 0.01


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine of the table, with one card or with eight; speeds in GB/s, memory in GiB."""

    card: str
    alone: float
    both: float
    memory_speed: float
    memory_gb: float
    box_gb: float

    @property
    def host(self) -> Host:
        return Host(
            self.alone * 1e9, self.both * 1e9, BOX * 2 * self.both * 1e9, self.memory_speed * 1e9, self.memory_gb
        )

    @property
    def flops(self) -> float:
        return _card(self.card).tflops * 1e12 * UTILISATION


def _card(name: str) -> Card:
    return next(card for card in CARDS if card.name == name)


MACHINES = (
    Machine("RTX 4090", 25, 20, 140, 256, 512),
    Machine("L4", 25, 20, 140, 256, 512),
    Machine("H100", 50, 40, 430, 256, 2048),
)
"""PCIe 4 with 16 lanes moves 31.5 GB/s by its data sheet, and pinned copies reach about 25 in one direction and 20 in
each of two; PCIe 5 twice that. Memory: 70 % of eight channels of DDR4-3200, and of sixteen of DDR5-4800."""


def work_of(checkpoint: str, tokens: int) -> Work:
    family, vocabulary, sizes = CHECKPOINTS[checkpoint]
    optimizer = Optimizer(name="muon", precision="pure_bf16", batch_tokens=tokens, micro_batch=4)
    return step_work(family, sizes, vocabulary, optimizer, sequence_length=SEQUENCE, gpu=1)


def fewest_tokens(checkpoint: str, machine: Machine, share: float) -> int:
    """Tokens per step, by eighths of powers of two, from which one card keeps a share of its speed."""
    counts = (2**power * eighths // 8 for power, eighths in itertools.product(range(12, 22), range(8, 16)))
    return next(
        (n for n in counts if step_time(work_of(checkpoint, n), machine.flops, machine.host).kept >= share), 2**22
    )


def row(checkpoint: str, machine: Machine) -> dict[str, Any]:
    one, box = work_of(checkpoint, TOKENS), work_of(checkpoint, BOX_TOKENS)
    alone = step_time(one, machine.flops, machine.host)
    large = _card("A100-80GB").tflops * 1e12 * UTILISATION
    in_box: dict[str, Any] = {"cards": BOX, "kept_gb": KEPT * _card(machine.card).memory_gb}
    shared = {each: step_time(box, machine.flops, machine.host, division=each, **in_box) for each in DIVISIONS}
    chosen, best = best_step(box, machine.flops, machine.host, **in_box)
    between = {
        f"{hosts} machines, {name}": step_between_hosts(one, machine.flops, machine.host, hosts=hosts, network=speed)
        for hosts, (name, speed) in itertools.product(HOSTS, NETWORKS.items())
    }
    fits = one.host_bytes / 2**30 <= machine.memory_gb
    return {
        "seconds": alone.seconds,
        "computing": alone.resident,
        "muon": one.update_flops / (one.flops - one.update_flops),
        "kept": alone.kept,
        "tokens": {str(share): fewest_tokens(checkpoint, machine, share) for share in (LEAST, GOAL)},
        "host_gb": one.host_bytes / 2**30,
        "verdict": _verdict(alone, fits=fits),
        "box": {each: found.kept for each, found in shared.items()},
        "box_seconds": best.seconds,
        "box_division": chosen,
        "box_verdict": _verdict(best, fits=box.host_bytes / 2**30 <= machine.box_gb),
        "hours_of_a100": best.seconds / (box.flops / large),
        "hosts": {name: found.kept for name, found in between.items()},
    }


def _verdict(step: StepTime, *, fits: bool) -> str:
    if not fits:
        return "no-go: host memory"
    return "go" if step.kept >= LEAST else "no-go: copies"


class Engines:
    """Handles tasks with three threads, and measures the time."""

    def __init__(self, tasks: Sequence[Task], link: Link) -> None:
        self._tasks, self._link = tasks, link
        self._changed = threading.Condition()
        self._done = [0, 0, 0]  # tasks copied in, computed, and copied out
        self._copying = [False, False]

    def seconds(self) -> float:
        threads = [threading.Thread(target=each) for each in (self._copies_in, self._computes, self._copies_out)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - began

    def _copies_in(self) -> None:
        for number, task in enumerate(self._tasks):
            after = -1 if task.after is None else task.after
            with self._changed:
                while number >= self._done[1] + PLACES or self._done[2] <= after:
                    self._changed.wait()
            self._copy(0, task.copied_in)

    def _computes(self) -> None:
        for number, task in enumerate(self._tasks):
            with self._changed:
                while number >= min(self._done[0], self._done[2] + PLACES):
                    self._changed.wait()
            if task.computing:
                time.sleep(task.computing)
            self._end(1)

    def _copies_out(self) -> None:
        for number, task in enumerate(self._tasks):
            with self._changed:
                while number >= self._done[1]:
                    self._changed.wait()
            self._copy(2, task.copied_out)

    def _copy(self, engine: int, size: float) -> None:
        mine, other = (0, 1) if engine == 0 else (1, 0)
        self._copying[mine] = size > 0
        last = time.monotonic()
        while size > 0:
            speed = self._link.both if self._copying[other] else self._link.alone
            time.sleep(min(_SLEEP, size / speed))
            now = time.monotonic()
            size -= (now - last) * speed
            last = now
        self._copying[mine] = False
        self._end(engine)

    def _end(self, engine: int) -> None:
        with self._changed:
            self._done[engine] += 1
            self._changed.notify_all()


def check(name: str, tasks: list[Task], link: Link) -> dict[str, Any]:
    """The planned time of tasks, scaled to about a second, and the measured time divided by it."""
    scale = SECONDS / timeline(tasks, link).seconds
    faster = Link(link.alone / scale, link.both / scale)
    scaled = [dataclasses.replace(task, computing=task.computing * scale) for task in tasks]
    planned = timeline(scaled, faster).seconds
    found = [Engines(scaled, faster).seconds() / planned for _ in range(ROUNDS)]
    print(name, found)
    return spread(found)


def checks() -> dict[str, dict[str, float]]:
    """Measured over planned time of steps that arithmetic bounds, that copies bound, and of one between the two."""
    found, link = {}, Link(25e9, 20e9)
    for name, tokens in (("4,096 tokens", 4096), ("16,384 tokens", 16_384), ("65,536 tokens", 65_536)):
        # Few layers have few pieces to update: each sleep takes about 0.1 ms longer than asked.
        work = dataclasses.replace(work_of("Qwen3-30B-A3B", tokens), layers=CHECKED_LAYERS, ends=0, head=0)
        tasks = step_tasks(work, MACHINES[0].flops)
        found[name] = check(name, tasks, link)
    return found


def main() -> None:
    rows: dict[str, dict[str, Any]] = {checkpoint: {} for checkpoint in SHAPES}
    for checkpoint, machine in itertools.product(SHAPES, MACHINES):
        rows[checkpoint][machine.card] = row(checkpoint, machine)
    write_result(
        "streamed_timeline",
        {
            **environment("python -m benchmarks.streamed_timeline"),
            "setting": {
                "precision": "pure_bf16",
                "optimizer": "muon",
                "sequence_length": SEQUENCE,
                "tokens": TOKENS,
                "box_tokens": BOX_TOKENS,
                "cards_of_a_box": BOX,
                "utilisation": UTILISATION,
                "machines": [dataclasses.asdict(machine) for machine in MACHINES],
            },
            "targets": {"least": LEAST, "goal": GOAL, "check": 0.05, "hours_of_a100": 0.3},
            "rows": rows,
            "check": checks(),
        },
    )


if __name__ == "__main__":
    main()
