"""What runs in the process of a slot: its part of an examination."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.measurements import Check, MemoryTrial, Part, SlotRecord
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.execution.card_product import failure
from moedisco_ray.execution.doctor.facts import CardFacts, card_facts, machine_facts, node_name
from moedisco_ray.execution.doctor.system import card_checks, machine_checks
from moedisco_ray.execution.doctor.work import SlotWork
from moedisco_ray.plan.memory import GIB
from moedisco_ray.training.examination.copies import copy_speeds, host_memory_speed, speed_to_card
from moedisco_ray.training.examination.exchanges import Exchange, Meeting, measure_exchanges
from moedisco_ray.training.examination.kernels import Kernels, Outcome, try_kernels
from moedisco_ray.training.examination.resume import LARGEST_DIFFERENCE, STEPS, Resumed, try_resuming
from moedisco_ray.training.examination.trial import SPEED_LAYERS, Trial, try_memory, try_speed

PLANNED_SHARE = 0.1
"""Largest difference between the measured peak of a card's memory and the planned one, as a share of the planned."""
_MEMORY_SECONDS = {"cuda": 15.0, "cpu": 3.0}
"""Time from which on no larger micro-batch is tried (s)."""
_SPEED_SECONDS = {"cuda": 5.0, "cpu": 1.0}
_HOST_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
_AT_ONCE_SECONDS = 2.0

_OTHER_TORCH = "install another build of torch or another driver, or leave this card out"

_FAILURES = (MoeDiscoError, RuntimeError, MemoryError, OSError, ValueError, TypeError)
"""What a trial raises on a machine that cannot do it: the report names it, and the other trials are made."""


@dataclasses.dataclass(frozen=True)
class SlotPlace:
    """Where a slot's process runs.

    Attributes:
        device: torch's name of its device.
        card: Index of its card on the machine.
        address: Address of the machine in the Ray cluster; None without one.
        resource: Resource of the slot in the Ray cluster; None without one.
    """

    device: str
    card: str = "0"
    address: str | None = None
    resource: str | None = None

    @property
    def gpu(self) -> bool:
        return self.kind != "cpu"

    @property
    def kind(self) -> str:
        """Kind of the device: `cuda` or `cpu`."""
        return torch.device(self.device).type


def look_at(work: SlotWork, place: SlotPlace) -> SlotRecord:
    """The first part of an examination: the card and its machine. It takes a few seconds."""
    node = node_name(place.address)
    record = SlotRecord(
        name=f"{node}, {f'GPU {place.card}' if place.gpu else 'CPU'}",
        node=node,
        device=place.device,
        pool=work.pool.key if work.wanted.path else None,
        resource=place.resource,
        kind=_kind("CPU", None),
    )
    machine = machine_facts()
    of_machine = machine_checks(machine, work.wanted, gpu=place.gpu)
    if not place.gpu:
        found = f"{torch.get_num_threads()} threads, {machine.available / GIB:.1f} GiB of memory available"
        checks = [Check(part="system", name="card", state="ok", found=f"none; {found}"), *of_machine]
        return record.model_copy(update={"checks": checks, "free_bytes": machine.available})
    problem = failure(f"{work.wanted.path or 'pools.*'}.gpu", place.card, place.device, place.address)
    if problem is not None:
        reason, _, remedy = problem.partition("; ")
        return record.model_copy(update={"checks": [_failed("system", "card", reason, remedy), *of_machine]})
    card = card_facts(place.device)
    return record.model_copy(
        update={
            "kind": _kind(card.name, card),
            "card": card.name,
            "memory_bytes": card.memory,
            "free_bytes": card.free,
            "checks": [*card_checks(card, work.wanted), *of_machine],
        }
    )


def works(record: SlotRecord) -> bool:
    """Whether a slot can be tried further: whatever else failed, torch computes on its device."""
    return all(check.state != "failed" or check.name == "free memory" for check in record.checks)


def examine(work: SlotWork, place: SlotPlace, *, brief: bool = False) -> SlotRecord:
    """The parts of an examination that one slot makes alone; those after the first only if its card works.

    Args:
        work: What to try.
        place: The slot's device.
        brief: Whether to leave out the trials that do not depend on the pool.
    """
    if not place.gpu:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))  # as a worker that trains
    record = look_at(work, place)
    return try_all(record, work, place, brief=brief) if works(record) else record


def try_all(record: SlotRecord, work: SlotWork, place: SlotPlace, *, brief: bool = False) -> SlotRecord:
    """Make the trials of a slot, whatever the ones before found, and add what they found to its record."""
    for part, name, trial in _trials(work, place, brief=brief):
        try:
            found = trial()
        except _FAILURES as error:
            found = Found([_failed(part, name, first_line(error))])
        record = record.model_copy(update={**found.fields, "checks": [*record.checks, *found.checks]})
    return record


def card_while_all_copy(place: SlotPlace) -> float:
    """Speed of copies to a slot's card (bytes/s), while the other slots of its node call this, too."""
    return speed_to_card(place.device, _AT_ONCE_SECONDS)


def exchange(meeting: Meeting, rank: int, place: SlotPlace) -> tuple[str | None, list[Exchange]]:
    """Measure exchanges with the other slots, which call this, too; also returns the interface that gloo uses."""
    return os.environ.get("GLOO_SOCKET_IFNAME"), measure_exchanges(meeting, rank, place.device)


@dataclasses.dataclass(frozen=True)
class Found:
    """What a trial found: its checks, and fields of the slot's record."""

    checks: list[Check]
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def _trials(work: SlotWork, place: SlotPlace, *, brief: bool) -> Iterator[tuple[Part, str, Callable[[], Found]]]:
    if not brief:
        yield "kernels", "kernels", functools.partial(_kernels, work, place.device)
    if work.trial is None:
        yield "memory", "training", functools.partial(_not_tried, work.why_not)
    else:
        memory = functools.partial(_memory, work.trial, place, work.wanted.path)
        alone = memory if work.one_worker else functools.partial(_not_tried, "several workers share the model")
        yield "memory", "training", alone
        yield "speed", "training", functools.partial(_speed, work.trial, place)
    if brief:
        return
    yield "speed", "host memory", functools.partial(_host_memory, place)
    if place.gpu:
        yield "speed", "copies", functools.partial(_copies, place.device)
    yield "resume", "resuming", functools.partial(_resuming, work, place)


def _kernels(work: SlotWork, device: str) -> Found:
    sizes = work.architecture.model_copy(update={"vocab_size": work.vocab_size})
    return Found([_kernel(each) for each in try_kernels(Kernels(work.family, sizes, work.optimizer), device)])


def _kernel(outcome: Outcome) -> Check:
    if outcome.impossible:
        return _skipped("kernels", outcome.name, outcome.reason or "")
    if outcome.error is None:
        return _failed("kernels", outcome.name, outcome.reason or "", _OTHER_TORCH)
    found = f"relative error {outcome.error:.2g}, at most {outcome.limit:.2g} passes"
    return (
        _ok("kernels", outcome.name, found) if outcome.passed else _failed("kernels", outcome.name, found, _OTHER_TORCH)
    )


def _not_tried(reason: str) -> Found:
    return Found([_skipped("memory", "training", reason)])


def _memory(trial: Trial, place: SlotPlace, path: str) -> Found:
    try:
        found = try_memory(trial, place.device, _MEMORY_SECONDS[place.kind])
    except MemoryError as error:
        remedy = f"set {path or 'the pool'}.memory_gb lower, so that the run chooses settings that fit"
        return Found([_failed("memory", trial.stage, f"out of memory with the planned settings ({error})", remedy)])
    return Found([memory_check(found, path, gpu=place.gpu), _largest(found, trial)], {"memory": found})


def memory_check(found: MemoryTrial, path: str, *, gpu: bool) -> Check:
    """Judge a peak of memory. Without a card it is the process' memory, and the plan an upper bound."""
    share = found.peak_bytes / max(1, found.planned_bytes)
    text = f"peak {found.peak_bytes / GIB:.2f} GiB, planned {found.planned_bytes / GIB:.2f} GiB"
    if not gpu or abs(share - 1) <= PLANNED_SHARE:
        return _ok("memory", found.stage, text)
    if share < 1:
        return _warning("memory", found.stage, text, "a larger model or micro-batch would fit than the plan says")
    remedy = f"set {path or 'the pool'}.memory_gb to {1 / share:.2f} of its value, so that the plan leaves room"
    return _failed("memory", found.stage, text, remedy)


def _largest(found: MemoryTrial, trial: Trial) -> Check:
    name = "largest micro-batch"
    if found.largest_micro_batch is None:
        return _skipped("memory", name, "not tried")
    return _ok("memory", name, f"{found.largest_micro_batch} of {trial.batch} sequences, planned {trial.micro_batch}")


def _speed(trial: Trial, place: SlotPlace) -> Found:
    found = try_speed(trial, place.device, _SPEED_SECONDS[place.kind])
    share = "" if found.mfu is None else f", {found.mfu:.0%} of the card's peak"
    layers = f"{min(SPEED_LAYERS, trial.architecture.num_hidden_layers)} layers"
    text = f"{found.tokens_per_second:,.0f} tokens/s with {layers}, {found.flops_per_second / 1e12:.3g} TFLOP/s{share}"
    return Found([_ok("speed", trial.stage, text)], {"speed": found})


def _host_memory(place: SlotPlace) -> Found:
    rate = host_memory_speed(_HOST_BYTES[place.kind])
    return Found([_ok("speed", "host memory", f"{rate / 1e9:.1f} GB/s")], {"host_memory": rate})


def _copies(device: str) -> Found:
    found = copy_speeds(device)
    ways = {"in": found.to_card, "out": found.from_card, "each way of both": found.both}
    text = ", ".join(f"{rate / 1e9:.1f} GB/s {way}" for way, rate in ways.items())
    return Found([_ok("speed", "copies", text)], {"copies": found})


def _resuming(work: SlotWork, place: SlotPlace) -> Found:
    with tempfile.TemporaryDirectory(prefix="moedisco-doctor-") as folder:
        return Found(
            [resume_check(try_resuming(work.family, work.optimizer, place.device, Path(folder)), gpu=place.gpu)]
        )


def resume_check(found: Resumed, *, gpu: bool) -> Check:
    """Judge a resumed training. The kernels of a GPU may add up in another order each time."""
    if found.restored_step != STEPS // 2:
        return _failed("resume", "resuming", f"it resumed from step {found.restored_step}, not {STEPS // 2}")
    if found.same:
        return _ok("resume", "resuming", f"{STEPS // 2} + {STEPS // 2} steps equal {STEPS}, bit for bit")
    text = f"losses of {STEPS // 2} + {STEPS // 2} steps differ from those of {STEPS} by {found.difference:.1e}"
    if gpu and found.difference <= LARGEST_DIFFERENCE:
        return _ok("resume", "resuming", f"{text}, as kernels of a GPU may")
    return _failed("resume", "resuming", text)


def _kind(name: str, card: CardFacts | None) -> str:
    driver = "" if card is None or card.driver is None else f", driver {card.driver}"
    return f"{name}{driver}, torch {torch.__version__}"


def _ok(part: Part, name: str, found: str) -> Check:
    return Check(part=part, name=name, state="ok", found=found)


def _skipped(part: Part, name: str, found: str) -> Check:
    return Check(part=part, name=name, state="skipped", found=found)


def _warning(part: Part, name: str, found: str, remedy: str) -> Check:
    return Check(part=part, name=name, state="warning", found=found, remedy=remedy)


def _failed(part: Part, name: str, found: str, remedy: str | None = None) -> Check:
    return Check(part=part, name=name, state="failed", found=found, remedy=remedy)
