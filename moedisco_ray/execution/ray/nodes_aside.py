"""Nodes and cards that a run leaves out: torch cannot compute on a GPU there, or trainings fail there."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import ray

from moedisco_ray.core.config import Pool
from moedisco_ray.core.errors import CardError, UserError
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.execution.ray import session
from moedisco_ray.policies.retrying import End
from moedisco_ray.policies.setting_aside import FAILURES, Failure, Place, Record, after_failure, is_repeated

_NODE_ID = "ray.io/node-id"
"""Label by which Ray selects nodes; Ray sets it on each node."""


MOST_IN_A_ROW = 5
"""Nodes that are put aside in a row, with no GPU found to work in between, until an autoscaler is not waited for: its
image or its driver is wrong, and each further node would cost money and fail too."""


class NodesAside:
    """What the work of a run avoids. Several threads may use this object.

    A node whose GPU failed its check is avoided until the run ends; work of a pool without GPUs may still run there. A
    card on which trainings fail, or a node without cards, is avoided for a while, as long as the pool has other slots.

    Args:
        clock: Returns the current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._errors: dict[str, UserError] = {}
        self._in_a_row = 0
        self._records: defaultdict[Place, Record] = defaultdict(Record)
        self._failures: dict[str, Failure] = {}

    def put(self, error: CardError, emit: Emit) -> None:
        """Put the nodes of an error, and of the errors that were found together with it, aside.

        Args:
            error: The failed check of a GPU.
            emit: Receives one `warning` for each node that was not aside before.
        """
        for each in (error, *error.others):
            if not isinstance(each, CardError):
                continue
            with self._lock:
                known = each.node_id in self._errors
                self._errors.setdefault(each.node_id, each)
                self._in_a_row += not known
            if not known:
                emit(Event("warning", data={"message": f"{each}; the run continues without this node"}))

    def found_working(self) -> None:
        """Note that torch can use a GPU of another node."""
        with self._lock:
            self._in_a_row = 0

    def training_failed(self, pool: Pool, place: Place, unit: str, end: End, emit: Emit) -> bool:
        """Count a failure of a training against the card on which it ran; put the card aside if it was not the first.

        Args:
            pool: Node type of the training's seat.
            place: Where the seat was.
            unit: Name of the training.
            end: How it failed.
            emit: Receives a `warning` if the card is put aside.

        Returns:
            Whether the card is aside now.
        """
        failure = Failure(end.step if end.kind == "failed" else None, place)
        with self._lock:
            before = self._failures.get(unit)
            self._failures[unit] = failure
            if before is not None and is_repeated(before, failure) and not self._others_failed(unit, before, failure):
                self._records.pop(before.place, None)
                return False
            self._records[place] = record = after_failure(self._records[place], unit, self._clock())
        if not self.has(pool, place):
            return False
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        named = dataclasses.replace(place, node_id=addresses.get(place.node_id, place.node_id))
        minutes = round((record.until - self._clock()) / 60)
        message = (
            f"trainings failed {FAILURES} times in a row on {named}, at last with: {end.reason}; "
            f"the run leaves it out for {minutes} minutes"
        )
        emit(Event("warning", data={"message": message}))
        return True

    def _others_failed(self, unit: str, *failures: Failure) -> bool:
        """Whether other trainings failed on the machines of a training's failures, so that those may be broken."""
        machines = {failure.place.node_id for failure in failures}
        return any(record.units - {unit} for place, record in self._records.items() if place.node_id in machines)

    def training_finished(self, place: Place) -> None:
        """Note that a training has finished on a card, so that earlier failures there do not count any more."""
        with self._lock:
            self._records.pop(place, None)

    def has(self, pool: Pool, place: Place) -> bool:
        """Whether the work of a pool avoids a card, or the whole node of it."""
        return place.node_id in self._failed_checks(pool) or any(map(place.overlaps, self._failing(pool)))

    def of(self, pool: Pool) -> frozenset[str]:
        """Ids of the nodes that a pool's work avoids."""
        failed = self._failed_checks(pool)
        return failed | {node_id for node_id, cards in self._failing_cards(pool).items() if cards is None}

    def room(self, pool: Pool) -> int:
        """Number of one-worker trainings that can run at once without the nodes and cards that are aside."""
        cards = sum(cards or 0 for cards in self._failing_cards(pool).values())
        return session.room(pool, self.of(pool), cards)

    def selector(self, pool: Pool, others: Collection[str] = ()) -> Mapping[str, str]:
        """Labels by which Ray keeps a pool's work away from these nodes, and from others."""
        nodes = sorted({*self.of(pool), *others})
        return {_NODE_ID: f"!in({','.join(nodes)})"} if nodes else {}

    def check(self, pool: Pool, workers: int = 1) -> None:
        """Check that workers of a pool can run on other nodes than those whose GPUs failed their check.

        An autoscaler may bring other nodes. Without one, work would wait for a person who notices.

        Raises:
            CardError: The other nodes have too few slots, and no autoscaler brings more; or it brings only nodes that
                are put aside, too.
        """
        aside = self._failed_checks(pool)
        if not aside:
            return
        if session.autoscales():
            with self._lock:
                if self._in_a_row >= MOST_IN_A_ROW:
                    raise next(reversed(self._errors.values()))
            return
        offering = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] in aside and _offers(node["Resources"], pool)
        ]
        if offering and sum(session.slots(node_type, aside) for node_type in pool.node_types) < workers:
            with self._lock:
                raise self._errors[offering[0]]

    def _failed_checks(self, pool: Pool) -> frozenset[str]:
        with self._lock:
            return frozenset(self._errors) if pool.gpu else frozenset()

    def _failing(self, pool: Pool) -> frozenset[Place]:
        """Cards that are left out for a while; none if the pool has no other slots."""
        with self._lock:
            now = self._clock()
            places = [place for place, record in self._records.items() if record.until > now]
        slots = {place: _slots_at(pool, place) for place in places if bool(place.card) == bool(pool.gpu)}
        if not any(slots.values()):
            return frozenset()
        others = session.room(pool, self._failed_checks(pool), sum(slots.values()))
        return frozenset(place for place, count in slots.items() if count) if others else frozenset()

    def _failing_cards(self, pool: Pool) -> dict[str, int | None]:
        """Number of cards left out for a while, by node id; None if the node has no others."""
        counts: defaultdict[str, int] = defaultdict(int)
        for place in self._failing(pool):
            counts[place.node_id] += _slots_at(pool, place)
        return {node_id: None if cards >= _slots_on(pool, node_id) else cards for node_id, cards in counts.items()}


def _offers(resources: Mapping[str, float], pool: Pool) -> bool:
    return any(resources.get(tag) for tag in pool.tags)


def _slots_at(pool: Pool, place: Place) -> int:
    """Number of slots of a pool that the cards of a place are, or that a node without cards has."""
    found = _slots_on(pool, place.node_id)
    return min(len(place.cards), found) if place.card else found


def _slots_on(pool: Pool, node_id: str) -> int:
    return sum(session.slots_on(node_type, node_id) for node_type in pool.node_types)
