"""While clients hold connections open and idle, a real service process answers others, and its log stays small."""

import contextlib
import json
import resource
import time

import pytest
from api_client import demo
from attacked_service import Target

from service.api.limits import capacity, raise_descriptor_limit

STREAMS_OF_A_TOKEN = 100


@pytest.fixture(
    scope="module",
    params=[pytest.param(512, id="512 descriptors"), pytest.param(None, id="all descriptors", marks=pytest.mark.slow)],
)
def target(request, tmp_path_factory):
    raise_descriptor_limit()
    home = tmp_path_factory.mktemp("held")
    found = Target(home, request.param)
    try:
        found.start(home)
        yield found
    finally:
        found.close()


@pytest.mark.slow
def test_three_thousand_idle_sockets_do_not_block_others(target):
    with contextlib.ExitStack() as stack, target.others_are_served():
        target.hold(stack, 3000)
        time.sleep(1.5)


@pytest.mark.slow
def test_heads_and_bodies_that_trickle_in_do_not_block_others(target):
    body = b"POST /v1/session HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as stack, target.others_are_served():
        held = target.hold(stack, 400, b"GET / HTTP/1.1\r\n") + target.hold(stack, 400, body)
        for _ in range(10):
            time.sleep(0.1)
            for each in held:
                with contextlib.suppress(ConnectionError):
                    each.send(b"x")


@pytest.mark.slow
def test_streams_of_one_token_are_limited_with_a_clear_answer(target):
    status, body = target.ask("POST", "/v1/runs", {"config": demo()})
    assert status == 201
    events = f"/v1/runs/{json.loads(body)['id']}/events"
    head = f"GET {events} HTTP/1.1\r\nHost: x\r\nAuthorization: {target.authorization}\r\n\r\n".encode()
    answers = []
    with contextlib.ExitStack() as stack, target.others_are_served():
        for _ in range(22):
            answers += [_status(each) for each in target.hold(stack, 50, head)]
        status, body = target.ask("GET", events)
    expected = min(STREAMS_OF_A_TOKEN, capacity(target.descriptors).streams)
    assert {each: answers.count(each) for each in answers} == {200: expected, 429: 1100 - expected}
    assert (status, "streams and downloads" in json.loads(body)["detail"]) == (429, True)
    target.until(lambda: target.ask("GET", f"{events}?follow=false")[0] == 200)  # their places are free again


def test_bodies_of_a_megabyte_do_not_block_others(target):
    large = json.dumps({"config": {"name": 1_000_000 * "x"}}).encode()
    lines = "POST /v1/estimates HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(large)}"
    strange, own = (
        "\r\n".join([*lines, f"Authorization: {proof}", "\r\n"]).encode() + large
        for proof in ("", target.authorization)
    )
    with contextlib.ExitStack() as stack, target.others_are_served():
        assert {_status(each) for each in target.hold(stack, 10, strange)} == {401}
        # One estimate of an owner is checked at a time; of those that wait, the newest.
        statuses = {_status(each) for each in target.hold(stack, 10, own)}
        assert 422 in statuses
        assert statuses <= {422, 429}
        target.hold(stack, 100, own[:-1])
        time.sleep(0.5)


def test_a_large_body_of_a_stranger_is_not_read(target):
    begun = "POST /v1/estimates HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{}\r\n\r\n"
    announced = begun.format("Content-Length: 1000000").encode()
    chunked = begun.format("Transfer-Encoding: chunked").encode() + b"10001\r\n" + 0x10001 * b" " + b"\r\n"
    report = announced.replace(b"/v1/estimates", b"/v1/runs/01ARZ3NDEKTSV4RRFFQ69G5FAV/report")
    with contextlib.ExitStack() as stack:
        for head in (announced, chunked, report):
            assert {_status(each) for each in target.hold(stack, 10, head)} == {401}


def test_the_soft_limit_on_files_is_raised_to_the_hard_one(target):
    assert resource.prlimit(target.process.pid, resource.RLIMIT_NOFILE) == (target.descriptors, target.descriptors)


def _status(connection):
    """Of the answer, which comes within the connection's timeout."""
    return int(connection.recv(65536).split(b" ", 2)[1])
