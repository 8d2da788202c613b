"""Seats of a run, with made-up actors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, GetTimeoutError

from moedisco_ray.core.config import LowMemoryPool, Pool
from moedisco_ray.execution.ray import seats as module
from moedisco_ray.execution.ray.seats import Seats

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
    def node(self) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: self)


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
            num_cpus: float,
            num_gpus: float,
            resources: dict[str, float],
            label_selector: Mapping[str, str],
        ) -> SimpleNamespace:
            def start() -> Process:
                held = {**resources, "CPU": num_cpus, "GPU": num_gpus}
                self.started.append(Process(name, held, labels=label_selector))
                return self.started[-1]

            return SimpleNamespace(remote=start)

        return SimpleNamespace(options=options)

    @staticmethod
    def get(process: Process, timeout: float | None = None) -> str:
        if not process.alive:
            raise ActorDiedError
        if not process.slot:
            assert timeout is not None, "it would wait forever"
            raise GetTimeoutError
        return f"node of {process.name}"

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


def test_work_that_follows_gets_the_same_process(seats: Seats, ray: Ray) -> None:
    for _ in range(3):
        use(seats)
    [process] = ray.started
    assert process.name.startswith("demo-low_memory-")
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
