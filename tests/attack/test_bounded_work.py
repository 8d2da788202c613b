"""While several owners ask a real service process for slow estimates, it answers others."""

import collections
import contextlib
import json
import threading
import time

import psutil
import pytest
from api_client import demo
from attacked_service import Target

OWNERS = 4
AT_ONCE = 40
SECONDS = 2.0
BYTES = 800_000
MACHINE = {"name": "a"}
HOSTILE = [
    {"corpus": {"sources": [{"path": "a/" * 390 + f"{i}*"} for i in range(950)]}},
    {"corpus": {"sources": [{"path": "**/" * 260 + str(i)} for i in range(950)]}},
    {"corpus": {"sources": [{"path": "a/" * 390 + str(i)} for i in range(950)]}},
    {"corpus": {f"k{i}": "v" for i in range(BYTES // 14)}},
    {"pools": {"low_memory": {"types": [MACHINE] * (BYTES // 14)}}},
    {"tags": {"a": "b"}, "x": [[[["1234567890123456", 1]]]] * 30_000},
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    home = tmp_path_factory.mktemp("bounded")
    found = Target(home)
    try:
        found.start(home)
        yield found
    finally:
        found.close()


def token_of(target, owner, scope):
    status, body = target.ask("POST", "/v1/tokens", {"name": owner, "owner": owner, "scopes": [scope]})
    assert status == 201
    return json.loads(body)["token"]


def end_tasks(target):
    """End the tasks that are computed, which nothing waits for: the children of the service's fork server."""
    for server in psutil.Process(target.process.pid).children():
        for task in server.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                task.kill()


@pytest.mark.slow
@pytest.mark.alone
def test_forty_hostile_estimates_at_once_do_not_delay_other_requests(target):
    """Four owners keep forty estimates of 0.8 MB in flight; another owner looks, estimates and submits meanwhile.

    Before (af276e38): each of the other requests, also GET /v1/identity, timed out after 10 s, for over a minute.
    """
    hostile = [token_of(target, f"mallory{i}", "read") for i in range(OWNERS)]
    ann = token_of(target, "ann", "submit")
    bodies = [json.dumps({"config": demo(**changes)}).encode() for changes in HOSTILE]
    answers, over = collections.Counter(), threading.Event()

    def attack(number):
        while not over.is_set():
            try:
                status, _ = target.ask(
                    "POST", "/v1/estimates", bodies[number % len(bodies)], 60, hostile[number % OWNERS]
                )
            except OSError as error:
                status = repr(error)
            if not over.is_set():  # afterwards, what is still computed is ended
                answers[status] += 1
            over.wait(0.2)

    attackers = [threading.Thread(target=attack, args=(number,)) for number in range(AT_ONCE)]
    requests = [
        ("GET", "/v1/identity", None, ann),
        ("GET", "/v1/runs", None, None),
        ("POST", "/v1/estimates", {"config": demo()}, ann),
        ("POST", "/v1/runs", {"config": demo()}, ann),
    ]
    target.ask("POST", "/v1/estimates", {"config": demo()})  # the first one starts the processes
    try:
        with target.others_are_served(requests):
            for each in attackers:
                each.start()
            time.sleep(SECONDS)
    finally:
        over.set()
        while any(each.is_alive() for each in attackers):
            end_tasks(target)
            time.sleep(0.1)
    assert set(answers) <= {200, 422, 429}, answers
