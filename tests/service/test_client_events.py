import itertools
import json
import signal
import threading

import anyio
import httpx
import pytest
from client_standin import PROMPT, RUN, Body, Script, event_stream, make, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.records.events import Event
from service.client import RetryPolicy, ServiceAway, ServiceProblem


def event(position):
    return Event(
        "progress", "submodels", "submodel-0", {"step": position, "text": "line\u2028end \u00e9"}, float(position)
    )


def message(position):
    found = event(position)
    data = {"type": found.type, "stage": found.stage, "unit": found.unit, "data": found.data, "time": found.time}
    return f"id: {position}\nevent: progress\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


END = b"event: end\ndata: {}\n\n"


def cut(text, places):
    """The text in pieces that end at the places."""
    places = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(places)]


class Service:
    """Has `length` events; connection n breaks after `breaks[n]` bytes, later ones do not."""

    def __init__(self, length, breaks=(), refusals=(), cuts=(), ends=True):
        self.length, self.breaks, self.refusals, self.cuts, self.ends = length, list(breaks), list(refusals), cuts, ends
        self.asked = []

    def __call__(self, request):
        seen = request.headers.get("last-event-id")
        self.asked.append(seen)
        if self.refusals and self.refusals.pop():
            return problem(503, "restarting")
        first = 0 if seen is None else int(seen) + 1
        text = (
            b": hello\n\n"
            + b"".join(message(position) for position in range(first, self.length))
            + (END if self.ends else b"")
        )
        if not self.breaks:
            return event_stream(cut(text, self.cuts))
        keep, broken = self.breaks.pop()
        return event_stream(cut(text[: keep % (len(text) + 1)], self.cuts), broken)


@settings(deadline=None)
@given(
    length=st.integers(0, 12),
    after=st.none() | st.integers(0, 11),
    breaks=st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=6),
    refusals=st.lists(st.booleans(), max_size=4),
    cuts=st.lists(st.integers(0, 3000), max_size=8),
)
def test_every_event_comes_once_and_in_order_however_the_connection_breaks(length, after, breaks, refusals, cuts):
    service = Service(length, breaks, refusals, cuts)
    found = list(make(service).events("x", after))
    first = 0 if after is None else after + 1
    assert found == [(position, event(position)) for position in range(first, length)]


def test_a_new_connection_asks_for_what_is_missing_only():
    service = Service(3, breaks=[(len(b": hello\n\n" + message(0) + message(1)) + 5, True)])
    assert [position for position, _ in make(service).events("x")] == [0, 1, 2]
    assert service.asked == [None, "1"]


def test_without_following_the_newest_event_is_the_last():
    service = Service(3, ends=False)
    assert len(list(make(service).events("x", follow=False))) == 3
    assert service.asked == [None, "2"]


def test_without_following_a_service_that_ends_early_is_asked_again():
    service = Service(3, ends=False, breaks=[(len(b": hello\n\n" + message(0)), False)])
    assert len(list(make(service).events("x", follow=False))) == 3


def test_events_that_are_repeated_are_passed_over_and_a_gap_is_asked_for_again():
    service = Script(
        [
            event_stream([message(0), message(0), message(1), message(3)]),
            event_stream([message(1), message(2), message(3), END]),
        ]
    )
    assert [position for position, _ in make(service).events("x")] == [0, 1, 2, 3]
    assert service.requests[1].headers["last-event-id"] == "1"


@pytest.mark.parametrize(
    "garbage", [b"id: 0\ndata: {\n\n", b"data: {}\n\n", b"id: x\ndata: {}\n\n", b"id: 0\ndata: []\n\n", message(5)]
)
def test_a_stream_that_makes_no_sense_is_given_up(garbage):
    service = Script([event_stream([garbage])])
    with pytest.raises(ServiceAway):
        # On a busy machine the first answer alone may take longer than a few hundredths of a second.
        list(make(service, RetryPolicy(seconds=0.3, first_wait=0.001)).events("x"))
    assert len(service.requests) > 1


def test_a_service_that_stays_away_is_given_up():
    with pytest.raises(ServiceAway, match="connection refused"):
        list(
            make(
                Script([httpx.ConnectError("connection refused")]), RetryPolicy(seconds=0.02, first_wait=0.001)
            ).events("x")
        )
    with pytest.raises(ServiceAway, match="ended before the run did"):
        list(make(Script([event_stream([])]), RetryPolicy(seconds=0.02, first_wait=0.001)).events("x"))
    with pytest.raises(ServiceProblem, match="busy"):
        list(make(Script([problem(503, "busy")]), RetryPolicy(seconds=0.02, first_wait=0.001)).events("x"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_stream_that_is_refused_is_not_asked_for_again(status):
    service = Script([problem(status, "no")])
    with pytest.raises(ServiceProblem, match="no"):
        list(make(service).events("x"))
    assert len(service.requests) == 1


def test_an_iterator_that_is_left_closes_its_connection():
    closed = []

    class Watched(Body):
        async def aclose(self):
            closed.append(True)

    stream = httpx.Response(
        200, headers={"Content-Type": "text/event-stream"}, stream=Watched([message(0), message(1)])
    )
    with make(lambda _: stream) as client:
        events = client.events("x")
        next(events)
        assert not closed
        events.close()
        assert closed


def test_waiting_ends_with_the_run_and_reads_only_what_is_new():
    asked = []

    def service(request):
        if request.url.path.endswith("/events"):
            asked.append(request.headers.get("last-event-id"))
            return event_stream([message(3), END])
        return httpx.Response(200, json=RUN | {"state": "failed" if asked else "running", "reason": "out of memory"})

    assert make(service).wait("x").reason == "out of memory"
    assert asked == ["2"]


def test_a_log_is_followed_line_by_line():
    service = Script(
        [problem(503), httpx.Response(200, stream=Body([b"one\ntw", b"o\xe2\x80\xa8\r", b"\n", b"", b"rest"]))]
    )
    assert list(make(service).follow_log("x", "driver", tail=5)) == ["one", "two\u2028", "rest"]
    assert service.requests[1].url.query == b"tail=5&follow=true"


def test_a_log_that_is_cut_off_says_so():
    service = Script([httpx.Response(200, stream=Body([b"one\n"], broken=True))])
    with pytest.raises(ServiceAway, match="connection reset"):
        list(make(service, PROMPT).follow_log("x"))
    assert len(service.requests) == 1


def test_messages_as_the_standard_has_them():
    text = (
        b": note\nretry: 3\n\n"
        + message(0)
        + b": ping\n\n"
        + message(1).replace(b"\n", b"\r\n")
        + b"event: end\ndata\n\n"
    )
    assert list(make(Script([event_stream([text])])).events("x")) == [(0, event(0)), (1, event(1))]


def test_a_quiet_stream_outlives_the_retry_policy(monkeypatch):
    """A connection that was open for some time works, even if it brought nothing: its loss starts the policy anew."""
    monkeypatch.setattr("service.client.http.STABLE_SECONDS", 0.0)
    service = Script([event_stream([b": ping\n\n"], broken=True)] * 5 + [event_stream([message(0), END])])
    assert [position for position, _ in make(service, RetryPolicy(seconds=1e-9)).events("x")] == [0]
    monkeypatch.setattr("service.client.http.STABLE_SECONDS", 60.0)
    with pytest.raises(ServiceAway):
        list(make(Script(service.answers), RetryPolicy(seconds=1e-9)).events("x"))


def test_ctrl_c_ends_the_wait_for_an_event():
    closed = threading.Event()

    class Silent(Body):
        async def __aiter__(self):
            yield message(0)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await anyio.sleep_forever()

        async def aclose(self):
            closed.set()

    stream = httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=Silent([]))
    with make(lambda _: stream) as client:
        events = client.events("x")
        assert next(events)[0] == 0
        with pytest.raises(KeyboardInterrupt):
            next(events)
    assert closed.is_set()
