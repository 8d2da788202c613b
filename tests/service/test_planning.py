"""The processes that plan requests: their limits, the places of owners, and what becomes of requests beyond them."""

import asyncio
import contextlib
import dataclasses
import json
import time

import psutil
import pytest
from api_client import demo

from moedisco_ray.core.records.measurements import (
    THIS_MACHINE,
    Measurements,
    SlotRecord,
    SpeedTrial,
    store_measurements,
)
from service.domain.path_sandbox import Roots
from service.domain.policies import Policy
from service.errors import InvalidRequest, Overloaded, TooCostly, TooMany
from service.planning.fork_server import Limits
from service.planning.messages import task_from_message, task_to_message
from service.planning.pool import MOST_WAITING_SUBMISSIONS, Places, PlanningPool
from service.planning.task import Parent, Start, Task, done

SLOW = {"x": [["1234567890123456"]] * 2_500_000}
"""A part of a body that is larger than a request may be, because smaller ones are refused within a second."""
LONG_PATHS = {"corpus": {"sources": [{"path": "a/" * 390 + f"{i}*"} for i in range(500)]}}
"""Takes about half of the five processor seconds that a plan may take."""


def task(tmp_path, **changes):
    roots = Roots((str(tmp_path),), (tmp_path / "runs",))
    return Task("estimate", json.dumps({"config": demo(**changes)}).encode(), Policy(), roots, here=False)


def server_of(planning, first):
    """Let a new pool do its first task; returns the process that it starts to do so."""
    earlier = psutil.Process().children()
    asyncio.run(planning.done(first))
    (server,) = [child for child in psutil.Process().children() if child not in earlier]
    return server


@contextlib.contextmanager
def pool(**limits):
    with contextlib.closing(PlanningPool(Limits(**limits))) as made:
        yield made


def test_a_task_keeps_its_paths_and_uris_on_the_way_to_its_process(tmp_path):
    roots = Roots(
        ("s3://bucket", str(tmp_path)), (tmp_path / "runs", "s3://runs/x"), homes=(tmp_path,), functions=("m:f",)
    )
    parent = Parent("01", {"name": "é", "tags": {"path": "x"}}, priority=3, budget_dollars=None)
    starts = {"corpus.sources.0.path": Start("01", tmp_path), "model.init.checkpoint": Start("02", "s3://runs/x/y")}
    sent = Task(
        "submission",
        b"\xff{",
        Policy(prices={"a": 1.5}),
        roots,
        here=True,
        parent=parent,
        starts=starts,
        scratch=tmp_path,
    )
    assert task_from_message(task_to_message(sent)) == sent


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"seconds": 0.05}, "more than 0.05 s,"),
        pytest.param({"processor_seconds": 1}, "1 s of processor time", marks=pytest.mark.slow),
        ({"memory": 200 * 2**20}, "200 MiB of memory"),
    ],
)
def test_a_task_beyond_a_limit_is_ended_with_an_answer_that_names_the_limit(tmp_path, limits, words):
    with pool(**limits) as planning:
        with pytest.raises(TooCostly, match=words):
            asyncio.run(planning.done(task(tmp_path, **SLOW)))
        if "processor_seconds" in limits:  # the others leave too little for an honest task
            assert b'"name":"demo"' in asyncio.run(planning.done(task(tmp_path)))


@pytest.mark.slow
def test_an_answer_does_not_wait_for_a_task_that_began_later(tmp_path):
    """Before: a later task's process inherited the earlier one's socket, whose answer came when that process ended."""

    async def both(planning):
        quick = asyncio.create_task(planning.done(task(tmp_path)))
        slow = asyncio.create_task(planning.done(task(tmp_path, **SLOW)))
        await quick
        await asyncio.sleep(0.3)
        assert not slow.done()
        with contextlib.suppress(TooCostly, InvalidRequest):  # which of them depends on the speed of the machine
            await slow

    with pool(seconds=60.0) as planning:
        asyncio.run(planning.done(task(tmp_path)))
        asyncio.run(both(planning))


def test_the_processes_are_small_and_end_with_the_pool(tmp_path):
    with pool() as planning:
        server = server_of(planning, task(tmp_path))
        assert server.memory_info().rss < 120 * 2**20
        assert server.children() == []
    assert not server.is_running()


def test_a_server_that_died_is_started_again(tmp_path):
    with pool() as planning:
        server_of(planning, task(tmp_path)).kill()
        for _ in range(2):
            with contextlib.suppress(Overloaded):
                answer = asyncio.run(planning.done(task(tmp_path)))
        assert answer


@pytest.mark.slow
def test_a_server_that_hangs_keeps_nothing_else_waiting_and_is_replaced(tmp_path):
    """Protects the service's event loop, which would wait for room in the server's queue, and for the server's end."""
    pauses = []

    async def hundreds(planning):
        async def tick():
            while True:
                began = time.monotonic()
                await asyncio.sleep(0.01)
                pauses.append(time.monotonic() - began)

        ticking = asyncio.create_task(tick())
        nothing = dataclasses.replace(task(tmp_path), body=b"")
        answers = await asyncio.gather(*(planning.done(nothing) for _ in range(300)), return_exceptions=True)
        ticking.cancel()
        return {type(answer) for answer in answers}

    with pool() as planning:
        stopped = server_of(planning, task(tmp_path))
        stopped.suspend()
        assert asyncio.run(hundreds(planning)) == {Overloaded, InvalidRequest}, "of the old and of the new process"
        assert not stopped.is_running()
    assert max(pauses) < 2


@pytest.mark.slow
def test_a_task_that_others_end_is_not_said_to_exceed_a_limit(tmp_path):
    async def killed(planning, server):
        asked = asyncio.create_task(planning.done(task(tmp_path, **SLOW)))
        for _ in range(1000):
            await asyncio.sleep(0.01)
            for child in server.children():
                with contextlib.suppress(psutil.NoSuchProcess):  # the one that this loop has killed
                    if child.cpu_times().user > 0.3:  # it has read the whole task
                        child.kill()
            if asked.done():
                break
        await asked

    with pool() as planning:
        server = server_of(planning, task(tmp_path))
        with pytest.raises(Overloaded, match="has ended; try again"):
            asyncio.run(killed(planning, server))


def test_the_newest_estimate_of_an_owner_takes_the_place_of_the_one_that_waits():
    async def all_of_them():
        places, log = Places("estimate"), []

        async def estimate(name, owner="ann"):
            try:
                async with places.taken(owner):
                    log.append(name)
                    await asyncio.sleep(0.02)
            except TooMany:
                log.append(f"{name} refused")

        await asyncio.gather(*(estimate(f"ann {i}") for i in range(4)), estimate("bob", "bob"))
        return log

    assert asyncio.run(all_of_them()) == ["ann 0", "ann 1 refused", "ann 2 refused", "bob", "ann 3"]


def test_submissions_of_an_owner_wait_for_each_other_up_to_a_limit():
    async def all_of_them():
        places, running, most = Places("submission"), set(), []

        async def submit(number):
            async with places.taken("ann"):
                running.add(number)
                most.append(len(running))
                await asyncio.sleep(0)
                running.remove(number)

        answers = await asyncio.gather(
            *(submit(i) for i in range(MOST_WAITING_SUBMISSIONS + 3)), return_exceptions=True
        )
        return max(most), [type(answer) for answer in answers].count(TooMany)

    assert asyncio.run(all_of_them()) == (1, 2)


def test_a_request_that_is_cancelled_leaves_its_place():
    async def all_of_them():
        places = Places("estimate")
        async with places.taken("ann"):
            waiting = asyncio.create_task(places.taken("ann").__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        async with asyncio.timeout(1), places.taken("ann"):
            return True

    assert asyncio.run(all_of_them())


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_an_estimate_does_not_hold_up_a_submission_of_the_same_owner(api):
    slow = {"config": demo(**LONG_PATHS)}

    async def both():
        estimating = asyncio.create_task(asyncio.to_thread(api.ann.post, "/v1/estimates", json=slow))
        await asyncio.sleep(0.2)
        made = await asyncio.to_thread(api.ann.post, "/v1/runs", json={"config": demo()})
        waited = estimating.done()
        answer = await estimating
        return made.status_code, answer.status_code, waited

    assert asyncio.run(both()) == (201, 200, False)


def test_an_estimate_here_uses_what_was_measured_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path / "cache"))
    cards = {"low_memory": {"gpu": 1}, "high_memory": {"gpu": 1}}
    speeds = [
        SpeedTrial(stage="submodels", experts=experts, tokens_per_second=1, flops_per_second=9e13) for experts in (1, 4)
    ]
    slots = [
        SlotRecord(name="a", node="a", device="cuda:0", kind="L4", card="NVIDIA L4", speed=speed) for speed in speeds
    ]
    store_measurements(Measurements(place=THIS_MACHINE, measured_at=time.time(), slots=slots))
    for here, begins in ((True, "measured by moedisco doctor 0 s ago: "), (False, "assumed: ")):
        found = done(dataclasses.replace(task(tmp_path, pools=cards), here=here))
        assert isinstance(found, bytes)
        assert [each["source"].startswith(begins) for each in json.loads(found)["speeds"]] == [True, True]
