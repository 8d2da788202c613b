"""An examination of slots, wherever they are: each alone, then the cards of a node together, then their exchanges."""

from __future__ import annotations

import contextlib
import functools
import itertools
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from typing import Protocol, TypeVar

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.measurements import Check, Measurements, NetworkRecord, SlotRecord, StorageRecord
from moedisco_ray.core.store.artifacts import versions
from moedisco_ray.core.store.locations import Location, first_line
from moedisco_ray.execution.doctor.slot import SlotPlace, card_while_all_copy, examine, exchange, works
from moedisco_ray.execution.doctor.storage import storage_speed
from moedisco_ray.execution.doctor.system import clock_check
from moedisco_ray.execution.doctor.work import SlotWork, Work
from moedisco_ray.training.examination.exchanges import Meeting

T = TypeVar("T")

_LOOPBACK = "127.0.0.1"
MOST_SECONDS = 480.0
"""Longest time of one slot's trials (s)."""
_EXCHANGE_SECONDS = 150.0
_STORAGE_SECONDS = 120.0
_EXCHANGED_BYTES = {True: 256 * 2**20, False: 16 * 2**20}
"""Bytes of an exchange, with cards and without."""
_STORED_BYTES = {True: 2**30, False: 64 * 2**20}
"""Bytes that are written to storage, with cards and without."""
_MOST_NODES = 4
"""Nodes from which the storage is measured; from all, it would take minutes."""
_SLOWER = 0.5
"""Share of the configured network below which it is named."""
_FAILURES = (MoeDiscoError, RuntimeError, OSError, TimeoutError)


class Slot(Protocol):
    """A process that holds a slot and runs functions, one after the other."""

    @property
    def work(self) -> SlotWork:
        """What to try on the slot."""

    @property
    def place(self) -> SlotPlace:
        """The slot's device."""

    @property
    def brief(self) -> bool:
        """Whether another pool's slot makes the trials that do not depend on the pool."""

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in the slot's process. Its result is a RuntimeError if the process ended."""


def examine_slots(
    slots: Sequence[Slot], work: Work, place: str, show: Callable[[str, Sequence[Check]], None]
) -> Measurements:
    """Make all parts of an examination.

    Args:
        slots: The slots, which nothing else uses meanwhile.
        work: What to try.
        place: Name of the cluster or of this machine, in the result.
        show: Called with the name of a slot, or of what was tried together, and its checks, as soon as they are known.
    """
    began = time.time()
    records = _alone(slots, show)
    healthy = [(slot, record) for slot, record in zip(slots, records, strict=True) if works(record)]
    networks = list[NetworkRecord]()
    copied, checks = _together(healthy)
    if checks:
        show("cards that copy at the same time", checks)
    for pool, members in _by_pool(healthy):
        found, made = _exchanges(pool, members)
        networks += found
        checks += made
        if made:
            show(f"{pool}, {len(members)} workers", made)
    storages, made = _storage(healthy, work.storage)
    if made:
        show("storage", made)
    return Measurements(
        place=place,
        measured_at=began,
        seconds=time.time() - began,
        slots=[copied.get(id(record), record) for record in records],
        networks=networks,
        storages=storages,
        checks=[*checks, *made],
        versions=versions(),
    )


def merged(parts: Sequence[Measurements], checks: Sequence[Check], place: str) -> Measurements:
    """One document of several examinations of one place, with further checks."""
    return Measurements(
        place=place,
        measured_at=min((part.measured_at for part in parts), default=time.time()),
        seconds=sum(part.seconds for part in parts),
        slots=[slot for part in parts for slot in part.slots],
        networks=[network for part in parts for network in part.networks],
        storages=[storage for part in parts for storage in part.storages],
        checks=[*checks, *(check for part in parts for check in part.checks)],
        versions=versions(),
    )


def _alone(slots: Sequence[Slot], show: Callable[[str, Sequence[Check]], None]) -> list[SlotRecord]:
    """The record of each slot; all slots are tried at the same time."""
    pending = {slot.call(functools.partial(examine, slot.work, slot.place, brief=slot.brief)): slot for slot in slots}
    records = dict[int, SlotRecord]()

    def add(slot: Slot, record: SlotRecord) -> None:
        show(record.name if record.pool is None else f"{record.name}, {record.pool}", record.checks)
        records[id(slot)] = record

    with contextlib.suppress(TimeoutError):
        for future in as_completed(pending, timeout=MOST_SECONDS):
            slot = pending[future]
            try:
                record = future.result()
                add(slot, record.model_copy(update={"checks": [*record.checks, *_clock(slot)]}))
            except _FAILURES as error:
                add(slot, _lost(slot, first_line(error)))
    for slot in slots:
        if id(slot) not in records:
            add(slot, _lost(slot, f"no answer within {MOST_SECONDS:.0f} s"))
    return [records[id(slot)] for slot in slots]


def _clock(slot: Slot) -> list[Check]:
    """Compare the clock of a slot's machine with this machine's."""
    if slot.place.address is None:
        return []
    before = time.time()
    there = slot.call(time.time).result(timeout=MOST_SECONDS)
    after = time.time()
    return [clock_check(there - (before + after) / 2, (after - before) / 2)]


def _lost(slot: Slot, reason: str) -> SlotRecord:
    """The record of a slot whose process ended."""
    place = slot.place
    node = place.address or socket.gethostname()
    check = Check(part="system", name="process", state="failed", found=reason)
    return SlotRecord(
        name=f"{node}, {f'GPU {place.card}' if place.gpu else 'CPU'}",
        node=node,
        device=place.device,
        pool=slot.work.pool.key,
        resource=place.resource,
        kind="unknown",
        checks=[check],
    )


def _together(healthy: Sequence[tuple[Slot, SlotRecord]]) -> tuple[dict[int, SlotRecord], list[Check]]:
    """Records with the speed of copies while all cards of a node copy, by the id of the record without it.

    Returns:
        The records, and a failed check for each card that does not copy then.
    """
    by_node: dict[str, dict[str, tuple[Slot, SlotRecord]]] = {}
    for slot, record in healthy:
        if record.copies is not None:
            by_node.setdefault(record.node, {})[slot.place.card] = (slot, record)
    found, checks = dict[int, SlotRecord](), list[Check]()
    for members in by_node.values():
        if len(members) < 2:
            continue
        rates = [slot.call(functools.partial(card_while_all_copy, slot.place)) for slot, _ in members.values()]
        for (_, record), rate in zip(members.values(), rates, strict=True):
            if record.copies is None:
                continue
            try:
                copies = record.copies.model_copy(update={"at_once": rate.result(timeout=_EXCHANGE_SECONDS)})
                found[id(record)] = record.model_copy(update={"copies": copies})
            except _FAILURES as error:
                text = f"{record.name}: {first_line(error) or 'no answer'}"
                checks.append(Check(part="speed", name="copies", state="failed", found=text))
    return found, checks


def _by_pool(healthy: Sequence[tuple[Slot, SlotRecord]]) -> Iterator[tuple[str, list[tuple[Slot, SlotRecord]]]]:
    """The slots of each pool, without those whose devices another pool has, too."""
    whole = (each for each in healthy if not each[0].brief)
    for pool, members in itertools.groupby(whole, key=lambda each: each[0].work.pool.key):
        yield pool, list(members)


def _exchanges(pool: str, members: Sequence[tuple[Slot, SlotRecord]]) -> tuple[list[NetworkRecord], list[Check]]:
    """Measure exchanges among the workers of a pool, if there are several."""
    if len(members) < 2:
        return [], []
    slots = [slot for slot, _ in members]
    first = slots[0].place
    try:
        port = slots[0].call(free_port).result(timeout=_EXCHANGE_SECONDS)
        nodes = tuple(record.node for _, record in members)
        meeting = Meeting(first.address or _LOOPBACK, port, nodes, _EXCHANGED_BYTES[first.gpu])
        calls = [slot.call(functools.partial(exchange, meeting, rank, slot.place)) for rank, slot in enumerate(slots)]
        found = [call.result(timeout=_EXCHANGE_SECONDS) for call in calls]
    except _FAILURES as error:
        remedy = (
            "let the machines reach each other on all ports, or name the interface that does "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        )
        return [], [Check(part="network", name=pool, state="failed", found=first_line(error), remedy=remedy)]
    records = {
        (each.backend, each.scope): NetworkRecord(
            pool=pool,
            resource=first.resource,
            backend=each.backend,
            scope=each.scope,
            workers=each.workers,
            interface=interface,
            all_reduce=each.all_reduce,
            all_to_all=each.all_to_all,
        )
        for interface, exchanges in found
        for each in exchanges
    }
    return list(records.values()), [network_check(record, slots[0].work) for record in records.values()]


def network_check(record: NetworkRecord, work: SlotWork) -> Check:
    """Judge an exchange: between nodes, by the network in the configuration."""
    name = f"{record.backend} {'within a node' if record.scope == 'within' else 'between nodes'}"
    all_to_all = "" if record.all_to_all is None else f", {record.all_to_all / 1e9:.2f} in an all-to-all"
    over = "" if record.interface is None else f", interface {record.interface}"
    found = f"{record.all_reduce / 1e9:.2f} GB/s in an all-reduce{all_to_all}{over}"
    configured = work.pool.network_bytes_per_second
    slow = record.scope == "between" and record.all_reduce < _SLOWER * configured and work.wanted.path
    if not slow or (record.backend == "gloo" and work.pool.gpu):
        return Check(part="network", name=name, state="ok", found=found)
    return Check(
        part="network",
        name=name,
        state="warning",
        found=f"{found}; the configuration says {work.pool.network:g} Gbit/s",
        remedy=f"set {work.wanted.path}.network={record.all_reduce * 8 / 1e9:.2g}; plans use what was measured",
    )


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as listening:
        listening.bind(("", 0))
        port: int = listening.getsockname()[1]
        return port


def _storage(healthy: Sequence[tuple[Slot, SlotRecord]], location: Location) -> tuple[list[StorageRecord], list[Check]]:
    """Measure the storage from a few nodes, one after the other."""
    one_per_node = {record.node: slot for slot, record in reversed(healthy)}
    records, checks = list[StorageRecord](), list[Check]()
    for node, slot in itertools.islice(one_per_node.items(), _MOST_NODES):
        size = _STORED_BYTES[slot.place.gpu]
        call = functools.partial(storage_speed, location, size, "checkpoint.storage", node)
        try:
            found = slot.call(call).result(timeout=_STORAGE_SECONDS)
        except _FAILURES as error:
            checks.append(Check(part="network", name="storage", state="failed", found=f"{node}: {first_line(error)}"))
            continue
        records.append(found)
        text = f"{node}: writes {found.write / 1e6:,.0f} MB/s, reads {found.read / 1e6:,.0f} MB/s, {found.location}"
        checks.append(Check(part="network", name="storage", state="ok", found=text))
    return records, checks
