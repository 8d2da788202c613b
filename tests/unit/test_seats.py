"""Seats of a run, with made-up actors."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import cast

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError, RaySystemError

from moedisco_ray.core.config import LowMemoryPool, Pool
from moedisco_ray.core.errors import RunError
from moedisco_ray.execution.ray import seats as module
from moedisco_ray.execution.ray.event_mailbox import RunMailbox
from moedisco_ray.execution.ray.mailbox_actor import TakenOverError, UnderWay
from moedisco_ray.execution.ray.seats import PlaceAsideError, Seats
from moedisco_ray.policies.setting_aside import Place

LOW = LowMemoryPool()


@dataclasses.dataclass
class Process:
    """A seat's process.

    Attributes:
        name: Its name in Ray.
        resources: What it holds.
        alive: Whether it answers.
        slot: Whether it has its slot.
        labels: Labels of the nodes on which it may start.
    """

    name: str
    resources: dict[str, float]
    alive: bool = True
    slot: bool = True
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: self)

    @property
    def leave(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: Leaving(self))


@dataclasses.dataclass(eq=False)
class Leaving:
    """The answer of a process that is asked to end."""

    process: Process


class Ray:
    """As much of Ray as seats need.

    Attributes:
        started: All processes so far.
        draining: Nodes that are about to go.
        now: The time.
    """

    def __init__(self) -> None:
        self.started: list[Process] = []
        self.draining: dict[str, int] = {}
        self.now = 0.0

    def remote(self, _actor: type) -> SimpleNamespace:
        def options(
            *,
            name: str,
            namespace: str,
            lifetime: str | None,
            num_cpus: float,
            num_gpus: float,
            resources: dict[str, float],
            label_selector: Mapping[str, str],
            enable_task_events: bool,
        ) -> SimpleNamespace:
            assert namespace
            assert lifetime is None
            assert not enable_task_events

            def start(own_name: str, mailbox: None) -> Process:
                assert own_name == name
                assert mailbox is None
                held = {**resources, "CPU": num_cpus, "GPU": num_gpus}
                self.started.append(Process(name, held, labels=label_selector))
                return self.started[-1]

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    @staticmethod
    def get(process: Process, timeout: float | None = None) -> tuple[str, str]:
        if not process.alive:
            raise ActorDiedError
        if not process.slot:
            assert timeout is not None, "it would wait forever"
            raise GetTimeoutError
        return f"node of {process.name}", ""

    @staticmethod
    def wait(leaving: list[Leaving], num_returns: int, timeout: float) -> tuple[list[Leaving], list[Leaving]]:
        """Those that answer end by themselves."""
        assert (num_returns, timeout) == (len(leaving), 5.0)
        ended = [each for each in leaving if each.process.slot]
        for each in ended:
            each.process.alive = False
        return ended, [each for each in leaving if not each.process.slot]

    @staticmethod
    def kill(process: Process) -> None:
        process.alive = False

    @property
    def alive(self) -> list[bool]:
        return [process.alive for process in self.started]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    made = Ray()
    monkeypatch.setattr(module, "ray", made)
    monkeypatch.setattr(module.ray_internals, "draining_nodes", lambda: made.draining)
    return made


@pytest.fixture
def seats(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seats]:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.001)
    with Seats("demo", lambda: ray.now) as opened:
        yield opened


def use(seats: Seats, pool: Pool = LOW) -> None:
    with seats.taken(pool) as seat:
        assert seat.wait()


@dataclasses.dataclass
class Mailbox:
    """A mailbox that serves another driver, once a test lets it."""

    namespace: str = "demo"
    handle: None = None
    taken_over: threading.Event = dataclasses.field(default_factory=threading.Event)
    lost: threading.Event = dataclasses.field(default_factory=threading.Event)
    serves_another: bool = True

    def call(self, _method: str, *_arguments: object) -> None:
        if self.serves_another:
            self.taken_over.set()
            raise TakenOverError("", None, "")

    def check(self) -> None:
        pass


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the seats that are killed; another driver has one with the number 9."""
    found: list[str] = []
    monkeypatch.setattr(module, "kill_named", lambda name, _namespace: found.append(name))
    monkeypatch.setattr(module, "named_actors", lambda _namespace: ["demo-mailbox", "demo-low_memory-9"])
    return found


BEGUN = {"submodel-0": UnderWay("attempt", "demo-low_memory-1", "low_memory", "folder", "node")}


def test_a_driver_that_was_taken_for_dead_kills_no_seat(ray: Ray, killed: list[str]) -> None:
    """Neither when it begins nor when it ends what it does not wait for.

    Before: at its start, the other driver's seats.
    """
    mailbox = Mailbox()
    with pytest.raises(TakenOverError):
        Seats("demo", mailbox=cast("RunMailbox", mailbox), under_way=BEGUN).__enter__()
    mailbox.serves_another = False
    with pytest.raises(TakenOverError), Seats("demo", mailbox=cast("RunMailbox", mailbox), under_way=BEGUN) as seats:
        assert killed.pop() == "demo-low_memory-9"
        mailbox.serves_another = True
        seats.end_under_way()
    assert killed == []


def test_a_training_whose_seat_cannot_be_asked_for_is_still_ended(
    ray: Ray, killed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get_actor(_name: str, _namespace: str) -> None:
        raise RaySystemError("the head does not answer")

    monkeypatch.setattr(ray, "get_actor", get_actor, raising=False)
    mailbox = cast("RunMailbox", Mailbox(serves_another=False))
    with pytest.raises(RaySystemError), Seats("demo", mailbox=mailbox, under_way=BEGUN) as seats:
        seats.claimed({"submodel-0": "folder"}, {"low_memory": LOW})
    assert killed == ["demo-low_memory-9", "demo-low_memory-1"]


def test_work_that_follows_gets_the_same_process(seats: Seats, ray: Ray) -> None:
    for _ in range(3):
        use(seats)
    [process] = ray.started
    assert process.name == "demo-low_memory-1"
    assert process.resources == {"low_mem_gpu": 1, "CPU": 0, "GPU": 0}
    assert seats.idle("low_mem_gpu") == 1


def test_work_at_the_same_time_gets_processes_of_its_own(seats: Seats, ray: Ray) -> None:
    with seats.taken(LOW), seats.taken(LOW):
        assert len(ray.started) == 2
        assert seats.idle("low_mem_gpu") == 0
    assert seats.idle("low_mem_gpu") == 2
    seats.end_idle()
    assert ray.alive == [False, False]


def test_a_process_whose_work_failed_is_ended(seats: Seats, ray: Ray) -> None:
    with pytest.raises(ZeroDivisionError), seats.taken(LOW):
        raise ZeroDivisionError
    assert ray.alive == [False]
    use(seats)
    assert ray.alive == [False, True]


def test_a_process_that_died_while_it_was_idle_costs_no_work(seats: Seats, ray: Ray) -> None:
    use(seats)
    ray.started[0].alive = False
    use(seats)
    assert len(ray.started) == 2


def test_an_idle_process_that_does_not_answer_is_replaced(seats: Seats, ray: Ray) -> None:
    use(seats)
    ray.started[0].slot = False
    use(seats)
    assert ray.alive == [False, True]


def test_a_seat_that_waits_for_its_slot_says_so(seats: Seats, ray: Ray) -> None:
    with seats.taken(LOW) as seat:
        ray.started[0].slot = False
        assert not seat.wait(0.0)
        ray.started[0].slot = True
        assert seat.wait(0.0)
        assert seat.node_id == f"node of {ray.started[0].name}"


def test_nothing_begins_on_a_node_that_is_about_to_go(seats: Seats, ray: Ray) -> None:
    use(seats)
    ray.draining = {f"node of {ray.started[0].name}": 1}
    use(seats)
    assert ray.alive == [False, True]


def test_a_seat_without_work_is_kept_for_a_while_only(seats: Seats, ray: Ray) -> None:
    use(seats)
    ray.now = module.IDLE_SECONDS
    use(seats)
    assert len(ray.started) == 1
    ray.now *= 2.5
    while ray.alive != [False]:
        pass  # the pytest timeout ends a wait that is in vain
    assert seats.idle("low_mem_gpu") == 0


def test_another_node_type_of_a_pool_gets_the_slot_of_an_idle_one(seats: Seats, ray: Ray) -> None:
    pool = LowMemoryPool.model_validate(
        {
            "max_workers": 1,
            "types": [
                {
                    "name": "small",
                    "speed": 1,
                    "resource": "small",
                    "memory_gb": 16,
                    "price_per_hour": 0.2,
                    "max_workers": 1,
                },
                {
                    "name": "large",
                    "speed": 2,
                    "resource": "large",
                    "memory_gb": 24,
                    "price_per_hour": 0.4,
                    "max_workers": 1,
                },
            ],
        }
    )
    small, large = pool.node_types
    use(seats, small)
    use(seats, large)
    assert ray.alive == [False, True]
    assert [process.resources["large"] for process in ray.started[1:]] == [1]


def test_the_end_of_a_run_ends_its_seats(ray: Ray) -> None:
    with Seats("demo", lambda: ray.now) as seats:
        use(seats)
    assert ray.alive == [False]


def test_a_seat_without_work_that_does_not_end_when_it_is_asked_to_is_killed(seats: Seats, ray: Ray) -> None:
    use(seats)
    ray.started[0].slot = False
    seats.end_idle()
    assert ray.alive == [False]


def test_a_seat_keeps_a_card_that_is_left_out_so_that_the_next_one_gets_another(
    seats: Seats, ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside, fails = {"node of demo-low_memory-1"}, threading.Event()

    def has(_pool: Pool, place: Place) -> bool:
        if threading.current_thread().name == "seats" and not fails.is_set():
            fails.set()
            raise RaySystemError("the head does not answer")
        return place.node_id in aside

    monkeypatch.setattr(seats.aside, "has", has)
    with pytest.raises(PlaceAsideError), seats.taken(LOW) as seat:
        seat.wait()
    use(seats)
    assert fails.wait(10)  # before: what was parked then stayed for ever
    assert ray.alive == [True, True]
    assert seats.idle("low_mem_gpu") == 2
    aside.clear()
    while ray.alive != [False, True]:
        pass  # the pytest timeout ends a wait that is in vain


def test_the_end_of_a_run_ends_seats_that_work_whatever_fails(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_arguments: object, **_limits: object) -> None:
        raise RaySystemError("the head does not answer")

    monkeypatch.setattr(module, "POLL_SECONDS", 60.0)
    with pytest.raises(RaySystemError), Seats("demo", lambda: ray.now) as seats:
        working = seats.taken(LOW)
        working.__enter__()
        use(seats)
        monkeypatch.setattr(ray, "wait", wait)
    assert ray.alive == [False, False]
    working.__exit__(None, None, None)


def test_of_a_run_whose_mailbox_has_ended_only_seats_without_a_slot_are_killed(ray: Ray) -> None:
    """The others save what they train and end by themselves."""
    mailbox = RunMailbox(None)
    seats = Seats("demo", lambda: ray.now)
    with seats.taken(LOW) as trains, seats.taken(LOW) as waits:
        trains.wait()
    seats._mailbox = mailbox
    mailbox.lost.set()
    for seat in (trains, waits):
        with pytest.raises(RunError, match="mailbox"), seats.lent(seat):
            mailbox.check()
    assert ray.alive == [True, False]
