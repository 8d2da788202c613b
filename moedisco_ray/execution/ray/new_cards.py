"""Look at the cards of a run before it begins, and examine one card of each kind that was not examined before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator
from concurrent.futures import Future

from moedisco_ray.backend import Placement, held_workers
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import CardError, MoeDiscoError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.records.measurements import (
    MEASUREMENTS,
    Check,
    Measurements,
    SlotRecord,
    place_of,
    store_measurements,
    stored_measurements,
)
from moedisco_ray.core.store.artifacts import versions, write_text
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.doctor.slot import look_at, try_all, works
from moedisco_ray.execution.doctor.work import SlotWork, Work, work_of
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.examined_slots import RaySlot, free_slots
from moedisco_ray.execution.ray.seats import Seats

LOOK_SECONDS = 60.0
"""Longest time of the look at a card (s); one that hangs is found by the check before its first work."""


def examine_new_cards(config: RunConfig, seats: Seats, emit: Emit, store: RunStore) -> None:
    """Look at every free slot with a card, and examine one card of each new kind; warn of what is not in order.

    Nodes with a card that torch cannot use are put aside. What was measured is stored for plans, and with the run. On
    nodes that come later, it is only checked that cards compute.

    Args:
        config: The run's configuration.
        seats: The run's seats.
        emit: Receives a `warning` for each check that did not pass, and meters the slots.
        store: Storage of the run.
    """
    if not any(pool.gpu for pool, _ in config.needed_pools):
        return
    work, place = work_of(config), place_of()
    known = _known(place, emit)
    records = list[SlotRecord]()
    for each in reversed(work.slots):  # the low-memory pool, whose seats the run uses first, comes last
        if each.pool.gpu:
            seats.end_idle()
            records += _looked_at(each, work, seats, emit, tried_kinds(known, each))
    for record in records:
        for check in record.checks:
            if check.is_bad and check not in _of_broken_card(record):
                remedy = "" if check.remedy is None else f"; {check.remedy}"
                emit(Event("warning", data={"message": f"{record.name}: {check.name}: {check.found}{remedy}"}))
    found = with_new(known, records, place, time.time())
    if found is not known:
        with contextlib.suppress(OSError):  # plans then assume more, and the run has the document
            store_measurements(found)
    write_text(store.directory / MEASUREMENTS, found.model_dump_json(indent=2) + "\n")
    store.publish(store.directory / MEASUREMENTS)


def tried_kinds(known: Measurements | None, work: SlotWork) -> frozenset[str]:
    """Kinds of cards whose trials for a pool are known."""
    slots = () if known is None else known.slots_of(work.pool)
    return frozenset(slot.kind for slot in slots if _tried(slot) and slot.pool == work.pool.key)


def with_new(known: Measurements | None, records: list[SlotRecord], place: str, now: float) -> Measurements:
    """The known measurements with those of new kinds of cards; the known ones themselves if no kind is new.

    The result is as old as its oldest part.
    """
    new = [record for record in records if _tried(record)]
    if known is not None and not new:
        return known
    if known is None:
        return Measurements(place=place, measured_at=now, slots=records, versions=versions())
    again = {(record.name, record.pool) for record in new}
    kept = [slot for slot in known.slots if (slot.name, slot.pool) not in again]
    return known.model_copy(update={"slots": [*kept, *new]})


def _tried(slot: SlotRecord) -> bool:
    """Whether more than the first part was tried on a slot."""
    return any(check.part == "kernels" for check in slot.checks)


def _known(place: str, emit: Emit) -> Measurements | None:
    try:
        return stored_measurements(place)
    except MoeDiscoError as error:
        emit(Event("warning", data={"message": str(error)}))
        return None


def _looked_at(each: SlotWork, work: Work, seats: Seats, emit: Emit, tried: frozenset[str]) -> Iterator[SlotRecord]:
    """The records of a pool's free slots."""
    free = session.free_workers(Placement(each.pool, 1, 0).bundle, seats.aside.of(each.pool))
    if not free:
        return
    of_pool = dataclasses.replace(work, slots=(each,))
    with free_slots(of_pool, {each.pool.key: free}, seats) as slots, _metered(emit, each, len(slots)):
        looks = [
            (slot, dataclasses.replace(slot, seconds=LOOK_SECONDS).call(functools.partial(look_at, each, slot.place)))
            for slot in slots
        ]
        found = [(slot, record) for slot, look in looks if (record := _result(look, emit)) is not None]
        for slot, record in found:
            for check in _of_broken_card(record):
                reason = f"{check.found}; {check.remedy}"
                seats.aside.put(CardError(f"{each.pool.path}.gpu", each.pool.gpu, reason, slot.seat.node_id), emit)
        new = first_of_each_kind(found, tried)
        trials = {
            id(slot): slot.call(functools.partial(try_all, record, slot.work, slot.place)) for slot, record in new
        }
        for slot, record in found:
            yield record if id(slot) not in trials else _result(trials[id(slot)], emit) or record


def _of_broken_card(record: SlotRecord) -> list[Check]:
    """The check of a card that torch cannot use; none if it can, or if there is no card."""
    return [check for check in record.checks if check.name == "card" and check.state == "failed"]


def _metered(emit: Emit, work: SlotWork, slots: int) -> contextlib.AbstractContextManager[None]:
    return held_workers(emit, work.pool, slots) if slots else contextlib.nullcontext()


def first_of_each_kind(
    found: list[tuple[RaySlot, SlotRecord]], tried: frozenset[str]
) -> list[tuple[RaySlot, SlotRecord]]:
    """The first slot of each kind of card that works and was not tried yet."""
    firsts = {record.kind: (slot, record) for slot, record in reversed(found) if record.card and works(record)}
    return [each for kind, each in firsts.items() if kind not in tried]


def _result(look: Future[SlotRecord], emit: Emit) -> SlotRecord | None:
    """A slot's record; None, with a warning, if its process ended or cannot use its card."""
    try:
        return look.result()
    except (MoeDiscoError, RuntimeError) as error:
        emit(Event("warning", data={"message": f"a card could not be examined: {error}"}))
        return None
