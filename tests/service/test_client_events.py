import itertools
import json

import httpx
import pytest
from client_standin import PROMPT, RUN, Body, Script, make, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.events import Event
from service.client import Patience, ServiceAway, ServiceProblem
from service.client.messages import COMMENT, Lines, Message, Messages

KINDS = ("sync", "async")


def event(position):
    return Event("progress", "submodels", "submodel-0", {"step": position, "text": "line\u2028end \u00e9"}, float(position))


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
        text = b": hello\n\n" + b"".join(message(position) for position in range(first, self.length)) + (END if self.ends else b"")
        if not self.breaks:
            return httpx.Response(200, stream=Body(cut(text, self.cuts)))
        keep, broken = self.breaks.pop()
        return httpx.Response(200, stream=Body(cut(text[:keep % (len(text) + 1)], self.cuts), broken))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(
    length=st.integers(0, 12), after=st.none() | st.integers(0, 11),
    breaks=st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=6),
    refusals=st.lists(st.booleans(), max_size=4), cuts=st.lists(st.integers(0, 3000), max_size=8))
def test_every_event_comes_once_and_in_order_however_the_connection_breaks(kind, length, after, breaks, refusals, cuts):
    service = Service(length, breaks, refusals, cuts)
    found = list(make(kind, service).events("x", after))
    first = 0 if after is None else after + 1
    assert found == [(position, event(position)) for position in range(first, length)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_connection_asks_for_what_is_missing_only(kind):
    service = Service(3, breaks=[(len(b": hello\n\n" + message(0) + message(1)) + 5, True)])
    assert [position for position, _ in make(kind, service).events("x")] == [0, 1, 2]
    assert service.asked == [None, "1"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_following_the_newest_event_is_the_last(kind):
    service = Service(3, ends=False)
    assert len(list(make(kind, service).events("x", follow=False))) == 3
    assert service.asked == [None, "2"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_following_a_service_that_ends_early_is_asked_again(kind):
    service = Service(3, ends=False, breaks=[(len(b": hello\n\n" + message(0)), False)])
    assert len(list(make(kind, service).events("x", follow=False))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_events_that_are_repeated_are_passed_over_and_a_gap_is_asked_for_again(kind):
    service = Script([
        httpx.Response(200, stream=Body([message(0), message(0), message(1), message(3)])),
        httpx.Response(200, stream=Body([message(1), message(2), message(3), END]))])
    assert [position for position, _ in make(kind, service).events("x")] == [0, 1, 2, 3]
    assert service.requests[1].headers["last-event-id"] == "1"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [
    b"id: 0\ndata: {\n\n", b"data: {}\n\n", b"id: x\ndata: {}\n\n", b"id: 0\ndata: []\n\n", message(5)])
def test_a_stream_that_makes_no_sense_is_given_up(kind, garbage):
    service = Script([httpx.Response(200, stream=Body([garbage]))])
    with pytest.raises(ServiceAway):
        list(make(kind, service, Patience(seconds=0.02, first=0.001)).events("x"))
    assert len(service.requests) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_that_stays_away_is_given_up(kind):
    with pytest.raises(ServiceAway, match="connection refused"):
        list(make(kind, Script([httpx.ConnectError("connection refused")]), Patience(seconds=0.02, first=0.001)).events("x"))
    with pytest.raises(ServiceAway, match="ended before the run did"):
        list(make(kind, Script([httpx.Response(200, stream=Body([]))]), Patience(seconds=0.02, first=0.001)).events("x"))
    with pytest.raises(ServiceProblem, match="busy"):
        list(make(kind, Script([problem(503, "busy")]), Patience(seconds=0.02, first=0.001)).events("x"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_stream_that_is_refused_is_not_asked_for_again(kind, status):
    service = Script([problem(status, "no")])
    with pytest.raises(ServiceProblem, match="no"):
        list(make(kind, service).events("x"))
    assert len(service.requests) == 1


def test_an_iterator_that_is_left_closes_its_connection():
    closed = []

    class Watched(Body):
        def close(self):
            closed.append(True)

    events = make("sync", Script([httpx.Response(200, stream=Watched([message(0), message(1)]))])).events("x")
    next(events)
    events.close()
    assert closed


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_ends_with_the_run_and_reads_only_what_is_new(kind):
    asked = []

    def service(request):
        if request.url.path.endswith("/events"):
            asked.append(request.headers.get("last-event-id"))
            return httpx.Response(200, stream=Body([message(3), END]))
        return httpx.Response(200, json=RUN | {"state": "failed" if asked else "running", "reason": "out of memory"})

    assert make(kind, service).wait("x").reason == "out of memory"
    assert asked == ["2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_is_followed_line_by_line(kind):
    service = Script([problem(503), httpx.Response(200, stream=Body([b"one\ntw", b"o\xe2\x80\xa8\n", b"", b"rest"]))])
    assert list(make(kind, service).follow_log("x", "driver", tail=5)) == ["one", "two\u2028", "rest"]
    assert service.requests[1].url.query == b"tail=5&follow=true"


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_that_is_cut_off_says_so(kind):
    service = Script([httpx.Response(200, stream=Body([b"one\n"], broken=True))])
    with pytest.raises(ServiceAway, match="connection reset"):
        list(make(kind, service, PROMPT).follow_log("x"))
    assert len(service.requests) == 1


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b\u2028\u0085", "", "\u00e9"]), max_size=6), st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 99)))
def test_lines_do_not_depend_on_where_chunks_end(lines, end, cuts):
    text = "".join(line + end for line in lines).encode()
    cutter = Lines()
    assert [line for chunk in cut(text, cuts) for line in cutter.take(chunk)] == lines
    assert cutter.rest() is None


def test_messages_as_the_standard_has_them():
    text = b": note\nevent: a\ndata: 1\ndata:2\nid: 7\nretry: 3\n\ndata\n\nid: 9\n\nevent: end\n\ndata: torn"
    assert list(Messages().take(text)) == [
        Message(COMMENT, " note", None), Message("a", "1\n2", "7"), Message("message", "", None), Message("end", "", None)]
