import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time

import httpx
import pytest
from api_client import service, signed
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.cli.reporter import Reporter
from moedisco_ray.core.config import Pools
from moedisco_ray.core.driver_proofs import (
    ATTEMPT_HEADER,
    DIGEST_HEADER,
    NONCE_HEADER,
    PROOF_HEADER,
    content_digest,
    is_proven,
    request_headers,
)
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.prices import PriceTag
from moedisco_ray.core.stop_file import StopFile
from service.api import streams
from service.api.limits import raise_descriptor_limit
from service.api.server import Server
from service.background import observed
from service.database import policies, runs, stream
from service.domain.policies import Policy
from service.domain.states import RunState

JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def listening(api):
    """The application behind a real uvicorn; yields its URL and stops it within seconds, even with open readers."""
    server = Server(api.app, api.settings)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server hangs on its streams"


@contextlib.contextmanager
def reading(api, url, run, token=None):
    """An open stream of a run; yields its text, piece by piece."""
    headers = {"Authorization": f"Bearer {token or api.plain['ann']}"}
    with httpx.stream("GET", f"{url}/v1/runs/{run}/events", headers=headers, timeout=30) as answer:
        assert answer.status_code == 200
        yield answer.iter_text()


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def messages(text):
    """[(id, event, data)] of a stream's text, comments left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "event" in fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found


def progress(step, unit="seed"):
    return Event("progress", "seed", unit, {"step": step, "steps": 100, "tokens": step, "loss": 2.0})


def finished(api, run):
    api.start(run)
    api.bring(run, RunState.SUCCEEDED)


def test_an_ended_runs_stream_is_everything_and_an_end(api):
    run = api.submit()["id"]
    api.start(run)
    api.report(run, *(progress(step) for step in range(1200)))
    api.bring(run, RunState.SUCCEEDED)
    answer = api.ann.get(f"/v1/runs/{run}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = messages(answer.text)
    assert [int(position) for position, _, _ in found[:-1]] == list(range(1204))
    assert [kind for _, kind, _ in found if kind == "state"] == ["state"] * 4
    assert found[-1] == (None, "end", {})
    assert found[3][2] == {
        "type": "progress",
        "stage": "seed",
        "unit": "seed",
        "time": found[3][2]["time"],
        "data": {"step": 0, "steps": 100, "tokens": 0, "loss": 2.0},
    }


def test_a_reader_continues_after_its_last_id(api):
    run = api.submit()["id"]
    finished(api, run)
    path = f"/v1/runs/{run}/events"
    by_header = messages(api.ann.get(path, headers={"Last-Event-ID": "1"}).text)
    assert [position for position, _, _ in by_header] == ["2", "3", None]
    assert messages(api.ann.get(path, params={"after": 1}).text) == by_header
    # A browser's header is newer than what stands in its URL.
    assert messages(api.ann.get(path, params={"after": 0}, headers={"Last-Event-ID": "1"}).text) == by_header
    assert [kind for _, kind, _ in messages(api.ann.get(path, params={"after": 10**9}).text)] == ["end"]
    assert api.ann.get(path, headers={"Last-Event-ID": "x"}).status_code == 422


def test_without_following_a_stream_ends_at_its_tail(api):
    run = api.submit()["id"]
    found = messages(api.ann.get(f"/v1/runs/{run}/events", params={"follow": False}).text)
    assert [kind for _, kind, _ in found] == ["state"]


def test_numbers_that_are_none_travel_as_null(api):
    run = api.submit()["id"]
    api.report(run, Event("progress", "seed", "seed", {"step": 1, "tokens": 1, "loss": float("nan")}))
    text = api.ann.get(f"/v1/runs/{run}/events", params={"follow": False}).text
    assert "NaN" not in text.replace('"nan"', "")


def test_a_live_stream_brings_what_is_reported(api):
    run = api.submit()["id"]
    with listening(api) as url, reading(api, url, run) as chunks:
        text = next(chunks)
        assert "retry: 2000" in text
        address = api.start(run)
        report = {"first": 0, "events": [json.loads(progress(1).to_json())]}
        sent = httpx.post(f"{url}/v1/runs/{run}/report", **signed(address, report))
        assert sent.json() == {"next": 1}
        api.bring(run, RunState.SUCCEEDED)
        text += "".join(chunks)
    assert [kind for _, kind, _ in messages(text)] == ["state", "state", "state", "progress", "state", "end"]


def test_streams_do_not_keep_the_service_from_ending(api):
    run = api.submit()["id"]

    def read(url, first, rest):
        with reading(api, url, run) as chunks:
            next(chunks)
            first.set()
            rest.append("".join(chunks))

    rest = []
    with listening(api) as url:
        opened = [threading.Event() for _ in range(5)]
        readers = [threading.Thread(target=read, args=(url, first, rest)) for first in opened]
        for reader in readers:
            reader.start()
        for first in opened:
            assert first.wait(20)
    for reader in readers:
        reader.join(20)
    assert len(rest) == 5, "a stream broke instead of ending"


def test_a_reader_that_leaves_leaves_nothing_behind(api):
    run = api.submit()["id"]
    context = api.app.state.context
    with listening(api) as url:
        with reading(api, url, run) as chunks:
            next(chunks)
            until(lambda: context.streams._feeds)
        until(lambda: not context.streams._feeds)
        assert context.prometheus.registry.get_sample_value("moedisco_event_streams") == 0


def test_many_readers_share_what_is_read(tmp_path, database_url, monkeypatch):
    raise_descriptor_limit()
    with service(tmp_path, database_url=database_url, max_streams_per_token=1000) as api:
        _share(api, monkeypatch, 100)


@pytest.mark.slow
def test_a_thousand_readers_share_what_is_read(tmp_path, monkeypatch):
    raise_descriptor_limit()
    with service(tmp_path, max_streams_per_token=1000) as api:
        _share(api, monkeypatch, 1000)


def _share(api, monkeypatch, readers):
    run = api.submit()["id"]
    driver = api.start(run)
    reads = []
    read = streams.Streams._read

    def counted(self, run_id, after):
        reads.append(after)
        return read(self, run_id, after)

    monkeypatch.setattr(streams.Streams, "_read", counted)
    with listening(api) as url:
        asyncio.run(_read(api, url, run, driver, readers))
    assert len(reads) < 300, "every reader reads for itself"


async def _read(api, url, run, driver, readers):
    address = url.removeprefix("http://").split(":")
    head = (
        f"GET /v1/runs/{run}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.plain['ann']}\r\n\r\n"
    ).encode()
    pairs = []
    for _ in range(readers // 50):
        pairs += await asyncio.gather(*(asyncio.open_connection(address[0], int(address[1])) for _ in range(50)))
        for _, writer in pairs[-50:]:
            writer.write(head)
        await asyncio.gather(*(reader.readuntil(b'"attempt":1}') for reader, _ in pairs[-50:]))
    async with httpx.AsyncClient(base_url=url) as client:
        for step in range(20):
            report = {"first": step, "events": [json.loads(progress(step).to_json())]}
            began = time.monotonic()
            answer = await client.post(f"/v1/runs/{run}/report", **signed(driver, report))
            assert answer.json() == {"next": step + 1}
            assert time.monotonic() - began < 10
    await asyncio.wait_for(asyncio.gather(*(reader.readuntil(b'"step":19') for reader, _ in pairs)), 60)
    for _, writer in pairs:
        writer.close()


def test_a_deleted_runs_stream_ends(api):
    run = api.submit()["id"]
    with listening(api) as url, reading(api, url, run) as chunks:
        next(chunks)
        assert api.ann.delete(f"/v1/runs/{run}").status_code == 204
        assert "event: end" not in "".join(chunks)


def test_a_revoked_token_ends_its_streams(api, monkeypatch):
    monkeypatch.setattr(streams, "RECHECK_SECONDS", 0.1)
    monkeypatch.setattr(streams, "PING_SECONDS", 0.1)
    run = api.submit()["id"]
    made = api.admin.post("/v1/tokens", json={"name": "x", "owner": "ann", "scopes": ["read"]}).json()
    with listening(api) as url, reading(api, url, run, made["token"]) as chunks:
        while ": ping" not in next(chunks):
            pass
        api.admin.delete(f"/v1/tokens/{made['id']}")
        assert "event: end" not in "".join(chunks)


def test_a_run_that_is_resumed_is_followed_further(api):
    run = api.submit()["id"]
    api.bring(run, RunState.CANCELLED)
    assert messages(api.ann.get(f"/v1/runs/{run}/events").text)[-1][1] == "end"
    api.bring(run, RunState.QUEUED, RunState.CANCELLED)
    found = messages(api.ann.get(f"/v1/runs/{run}/events").text)
    assert [data.get("state") or data.get("data", {}).get("state") for _, _, data in found] == [
        "queued",
        "cancelled",
        "queued",
        "cancelled",
        None,
    ]


def test_a_report_is_taken_once_and_a_gap_asked_for_again(api):
    run = api.submit()["id"]
    address = api.start(run)

    def report(first, *events):
        return api.drive(address, {"first": first, "events": [json.loads(event.to_json()) for event in events]})

    assert report(0, progress(1), progress(2)).json() == {"next": 2}
    assert report(0, progress(1), progress(2), progress(3)).json() == {"next": 3}
    assert report(9, progress(9)).json() == {"next": 3}
    assert report(3).json() == {"next": 3}
    assert len(messages(api.ann.get(f"/v1/runs/{run}/events", params={"follow": False}).text)) == 3 + 3
    curve = api.ann.get(f"/v1/runs/{run}/metrics", params={"figure": "loss"}).json()["series"][0]
    assert (curve["step"], curve["value"]) == ([1, 2, 3], [2.0, 2.0, 2.0])
    assert api.ann.get(f"/v1/runs/{run}/submodels").json()["items"][0]["unit"] == "seed"


def test_a_driver_that_finds_a_shorter_log_than_was_reported_is_heard_from_its_first_line(api, tmp_path):
    """As on a new head: the log at the run's URI lacks the last seconds."""
    run = api.submit()["id"]
    log_file = api.directory(run) / "events.jsonl"
    started, held = Event("run_started", data={"stages": ["seed"]}), {"pool": "low_memory", "workers": 1}

    def drive(attempt, *events):
        (tmp_path / "report-to").write_text(api.address(run, attempt, url).to_json())
        reporter = Reporter(tmp_path / "report-to", log_file, StopFile())
        log = EventLog(log_file, (reporter,))
        for event in events:
            log(event)
        log.close()
        reporter.close()

    with listening(api) as url:
        api.start(run)
        drive(1, started, Event("workers_held", "seed", data=held | {"hold": "a"}), *map(progress, range(20)))
        log_file.write_text("".join(log_file.read_text().splitlines(keepends=True)[:10]))
        with api.database.read() as session:
            waiting = observed.awaiting(runs.get(session, run).progress)
        api.bring(run, RunState.QUEUED)
        api.bring(run, RunState.STARTING, attempt=2, progress=waiting)
        drive(2, started, Event("workers_held", "seed", data=held | {"hold": "b"}), progress(5))
    with api.database.read() as session:
        row = runs.get(session, run)
        kinds = [event.type for event in stream.read(session, run, -1, 1000) if event.type != "state"]
    assert kinds == ["run_started", "workers_held", *["progress"] * 20, "run_started", "workers_held", "progress"]
    assert (observed.observed_state(row, 0.0).began, list(row.meter["open"]), row.next_seq) == (True, ["b"], 13)


def test_a_driver_charges_new_workers_the_price_that_the_operator_has_set_meanwhile(api, tmp_path):
    """Each answer to a driver has the present prices of its resources; workers that hold slots keep theirs.

    Before (af276e38): no answer had a price, so that the driver's report kept the price at submission for all hours.
    """
    run = api.submit()["id"]
    log_file, tag = api.directory(run) / "events.jsonl", PriceTag(Pools())

    def held(name):
        return Event("workers_held", "seed", data={"hold": name, "pool": "low_memory", "workers": 1})

    with listening(api) as url:
        api.start(run)
        (tmp_path / "report-to").write_text(api.address(run, 1, url).to_json())
        reporter = Reporter(tmp_path / "report-to", log_file, StopFile(), tag.change)
        log = EventLog(log_file, (reporter,), tag)
        with api.database.write() as session:
            policies.put(session, "ann", Policy(prices={"low_mem_gpu": 1.0, "other": 9.0}), time.time())
        log(held("a"))
        until(lambda: tag(held("b")).data["price_per_hour"] == 1.0)
        log(held("b"))
        log.close()
        reporter.close()
    with api.database.read() as session:
        holds = runs.get(session, run).meter["open"]
    assert {name: hold["price_per_hour"] for name, hold in holds.items()} == {"a": 0.35, "b": 1.0}


def test_only_the_present_attempts_driver_reports(api):
    run, other = api.submit()["id"], api.submit()["id"]
    address, strange = api.start(run), api.start(other)
    nothing = {"first": 0, "events": []}
    assert api.drive(address, nothing).status_code == 200
    wrong = [
        dataclasses.replace(address, attempt=2),
        dataclasses.replace(address, key=strange.key),
        dataclasses.replace(address, url=strange.url),
        dataclasses.replace(address, key=b""),
    ]
    assert {api.drive(each, nothing).status_code for each in wrong} == {401}
    for who in ("admin", "ann"):
        assert api.client(who).post(f"/v1/runs/{run}/report", json=nothing).status_code == 401
    api.bring(run, RunState.QUEUED)
    assert api.drive(address, nothing).status_code == 410
    api.bring(run, RunState.STARTING, attempt=2)
    assert api.drive(address, nothing).status_code == 410
    assert api.drive(api.address(run, 2), nothing).status_code == 200


def test_a_deleted_runs_driver_is_dismissed(api):
    run, nothing = api.submit()["id"], {"first": 0, "events": []}
    address = api.start(run)
    api.bring(run, RunState.STOPPING, RunState.CANCELLED)
    assert api.ann.delete(f"/v1/runs/{run}").status_code == 204
    assert api.drive(address, nothing).status_code == 410


def test_a_driver_outlasts_a_service_with_another_or_an_older_database(api):
    """Before (af276e38): the answer was 404, which ended the run; until this change, it was 410 with a proof."""
    never, nothing = api.address("01JDB5W3XQ3N8QZ7V0G6M4T9KE"), {"first": 0, "events": []}
    run = api.submit()["id"]
    for ahead in (never, api.address(run)):
        answer = api.drive(ahead, nothing)
        assert (answer.status_code, PROOF_HEADER in answer.headers) == (404, False)


def test_only_answers_to_the_runs_driver_are_signed(api):
    run = api.submit()["id"]
    address = api.start(run)
    body, nonce = b'{"first": 0, "events": []}', "0" * 32
    path, headers = f"/v1/runs/{run}/report", JSON | request_headers(address, nonce, body)

    def proven(answer, nonce=nonce):
        return is_proven(answer.headers.get(PROOF_HEADER, ""), address.key, nonce, answer.status_code, answer.content)

    answer = api.anonymous.post(path, content=body, headers=headers)
    assert (answer.json(), proven(answer), proven(answer, "1" * 32)) == ({"next": 0}, True, False)
    refused = [
        api.anonymous.post(path, content=body, headers=headers | {name: value})
        for name, value in [
            (NONCE_HEADER, "1" * 32),
            (ATTEMPT_HEADER, "2"),
            (DIGEST_HEADER, content_digest(b"")),
            (PROOF_HEADER, ""),
            (PROOF_HEADER, "0" * 64),
        ]
    ]
    refused += [
        api.anonymous.post(path, content=b'{"first": 1, "events": []}', headers=headers),
        api.anonymous.post(path),
    ]
    assert {answer.status_code for answer in refused} == {401}
    assert not any(PROOF_HEADER in answer.headers for answer in refused)
    api.bring(run, RunState.QUEUED)
    answer = api.anonymous.post(path, content=body, headers=headers)
    assert (answer.status_code, proven(answer)) == (410, True)


@settings(max_examples=examples(8, 20))
@given(data=st.data())
def test_a_report_that_is_recorded_and_sent_again_changes_nothing(shared, data):
    """Proofs have no time, so what was sent once is taken again; the numbers of the lines make that harmless."""
    run = shared.submit()["id"]
    address = shared.start(run)
    sent, first = [], 0
    for size in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5)):
        begin = {"begin": 0} if data.draw(st.booleans()) else {}
        events = [json.loads(progress(step).to_json()) for step in range(first, first + size)]
        body = json.dumps({"first": first, "events": events, **begin}).encode()
        sent.append((body, JSON | request_headers(address, f"{len(sent):032x}", body)))
        first += size

    def post(number):
        body, headers = sent[number]
        return shared.anonymous.post(f"/v1/runs/{run}/report", content=body, headers=headers).json()["next"]

    def stored():
        with shared.database.read() as session:
            return runs.get(session, run).next_seq, [
                (event.type, event.data) for event in stream.read(session, run, -1, 1000)
            ]

    for number in range(len(sent)):
        post(number)
        before = stored()
        for earlier in data.draw(st.lists(st.integers(0, number), max_size=3)):
            assert post(earlier) == before[0]
        assert stored() == before
    assert before[0] == first


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"{}", 422),
        (b'{"first": -1, "events": []}', 422),
        (b'{"first": 0, "events": [{"type": "x"}]}', 422),
        (
            (
                b'{"first": 0, "events": [{"type": "progress", "unit": "u\\u0000", "time": 1, '
                b'"data": {"step": 1e400, "loss": NaN}}]}'
            ),
            200,
        ),
        (b"\xff", 400),
        (b"", 400),
    ],
)
def test_reports_that_cannot_be_are_refused(shared, body, status):
    run = shared.submit()["id"]
    answer = shared.drive(shared.start(run), body)
    assert answer.status_code == status, answer.text


def test_a_report_may_be_larger_than_other_bodies(tmp_path):
    with service(tmp_path, max_body_bytes=5000, max_report_bytes=100_000) as api:
        run = api.submit()["id"]
        address = api.start(run)
        body = {"first": 0, "events": [json.loads(progress(step).to_json()) for step in range(100)]}
        assert api.drive(address, body).json() == {"next": 100}
        body["events"] *= 20
        assert api.drive(address, body).status_code == 413


def test_the_final_event_wakes_the_reconciler(api):
    run = api.submit()["id"]
    address = api.start(run)
    wakes = len(api.wakes)
    for first, event in enumerate([progress(1), Event("run_finished", data={"seconds": 1.0})]):
        api.drive(address, {"first": first, "events": [json.loads(event.to_json())]})
        assert len(api.wakes) - wakes == first
    with api.database.read() as session:
        assert runs.get(session, run).progress["ended"]["type"] == "run_finished"
