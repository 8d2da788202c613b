from __future__ import annotations

import contextlib
import http.server
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from reconciling import Scene

from service.background import outgoing as outgoing_requests
from service.background.deliveries import AT_ONCE, AT_ONCE_PER_WEBHOOK, DELIVERY_HEADER, Deliveries
from service.background.housekeeping import Housekeeping
from service.background.loop import Loop
from service.background.outgoing import Outgoing, Undeliverable
from service.database import idempotency, webhooks
from service.database.session import Database
from service.domain.signatures import SIGNATURE_HEADER, sign
from service.domain.states import RunState
from service.errors import DatabaseUnavailable


class Receiver(http.server.ThreadingHTTPServer):
    """Records requests and gives the prepared answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook?x=1"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers) | {"path": self.path}, body))
        self.server.gate.wait(10)
        self.send_response(self.server.answers.pop(0) if self.server.answers else 204)
        self.send_header("Location", "http://127.0.0.1:1/elsewhere")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.gate.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene.on(database, tmp_path)


def deliver(scene: Scene, later: float = 0.0, **options: bool) -> None:
    """One round of a service that is started for it, and ended after it."""
    outgoing = Outgoing(**({"allow_private": True} | options))
    deliveries = Deliveries(scene.database, outgoing, clock=lambda: scene.now + later, fraction=lambda: 0.0)
    deliveries.round(scene.now + later)
    deliveries.close()


def hook(scene: Scene, url: str, states: tuple[RunState, ...] = ()) -> str:
    with scene.database.write() as session:
        return webhooks.create(session, owner="ann", url=url, states=states, now=scene.now).id


def kept(scene: Scene, hook_id: str) -> list[tuple[int, str | None, bool]]:
    """Attempts, last answer, and whether it arrived, newest delivery first."""
    with scene.database.read() as session:
        return [(each.attempts, each.answer, each.delivered is not None) for each in webhooks.deliveries(session, hook_id)]


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_change_of_state_is_delivered_once_and_signed(scene, receiver):
    hook_id = hook(scene, receiver.url)
    run_id = scene.submit()
    deliver(scene)
    deliver(scene)
    [(headers, body)] = receiver.got
    message = json.loads(body)
    assert (message["type"], message["run"]["id"], message["run"]["state"]) == ("run.state", run_id, "queued")
    assert headers[DELIVERY_HEADER] == message["id"]
    assert headers["path"] == "/hook?x=1"
    assert headers["Host"] == f"127.0.0.1:{receiver.server_address[1]}"
    with scene.database.read() as session:
        secret = webhooks.get(session, hook_id).secret
    assert headers[SIGNATURE_HEADER] == sign(secret, body, scene.now)
    assert kept(scene, hook_id) == [(1, "204", True)]


def test_what_fails_is_tried_again_later_with_the_same_id(scene, receiver):
    hook_id = hook(scene, receiver.url)
    scene.submit()
    receiver.answers = [500, 503]
    deliver(scene)
    assert kept(scene, hook_id) == [(1, "500", False)]
    deliver(scene, later=1)
    assert len(receiver.got) == 1, "not due yet"
    deliver(scene, later=3)
    deliver(scene, later=10)
    assert kept(scene, hook_id) == [(3, "204", True)]
    assert len({headers[DELIVERY_HEADER] for headers, _ in receiver.got}) == 1


def test_a_receiver_that_is_away_for_a_day_is_given_up(scene):
    hook_id = hook(scene, "http://127.0.0.1:1/")
    scene.submit()
    for hour in range(26):
        deliver(scene, later=3600.0 * hour)
    [(attempts, answer, delivered)] = kept(scene, hook_id)
    assert (attempts, delivered) == (25, False)
    assert "ConnectError" in answer


def test_redirects_are_not_followed(scene, receiver):
    hook_id = hook(scene, receiver.url)
    scene.submit()
    receiver.answers = [307]
    deliver(scene)
    assert len(receiver.got) == 1
    assert kept(scene, hook_id) == [(1, "307", False)]


def test_addresses_of_ours_are_refused_after_resolving(scene, receiver):
    hook_id = hook(scene, receiver.url.replace("127.0.0.1", "localhost"))
    scene.submit()
    deliver(scene, allow_private=False)
    assert receiver.got == []
    assert kept(scene, hook_id) == [(1, "localhost is not a public address", False)]


def test_only_webhooks_for_a_state_report_it(scene, receiver):
    hook(scene, receiver.url, (RunState.STARTING,))
    scene.submit()
    deliver(scene)
    assert receiver.got == []
    scene.round()
    deliver(scene)
    assert [json.loads(body)["run"]["state"] for _, body in receiver.got] == ["starting"]


def test_a_delivery_is_not_lost_when_the_database_is_away_for_its_note(scene, receiver, monkeypatch):
    hook_id = hook(scene, receiver.url)
    scene.submit()

    def away(*args: object, **kwargs: object) -> None:
        raise DatabaseUnavailable("gone")

    with monkeypatch.context() as patch:
        patch.setattr(webhooks, "record_attempt", away)
        deliver(scene)
    deliver(scene)
    assert len(receiver.got) == 2
    assert receiver.got[0][0][DELIVERY_HEADER] == receiver.got[1][0][DELIVERY_HEADER]
    assert kept(scene, hook_id) == [(1, "204", True)]


def test_a_slow_receiver_holds_up_only_itself(scene, receiver):
    slow = hook(scene, receiver.url)
    for _ in range(5):
        scene.submit()
    receiver.gate.clear()
    deliveries = Deliveries(scene.database, Outgoing(allow_private=True), clock=lambda: scene.now)
    for _ in range(3):
        deliveries.round(scene.now)
    eventually(lambda: len(receiver.got) == AT_ONCE_PER_WEBHOOK)
    with Receiver() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.05,))
        thread.start()
        quick = hook(scene, other.url)
        scene.submit()
        deliveries.round(scene.now)
        eventually(lambda: kept(scene, quick) == [(1, "204", True)])
        other.shutdown()
        thread.join()
    assert len(receiver.got) == AT_ONCE_PER_WEBHOOK
    receiver.gate.set()

    def all_arrived() -> bool:
        deliveries.round(scene.now)
        return all(delivered for _, _, delivered in kept(scene, slow))

    eventually(all_arrived)
    deliveries.close()
    assert len(receiver.got) == 6


def test_a_receiver_that_answers_byte_by_byte_is_cut_off(scene, monkeypatch):
    monkeypatch.setattr(outgoing_requests, "DEADLINE", 0.5, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        hook_id = hook(scene, f"http://127.0.0.1:{server.getsockname()[1]}/")
        scene.submit()

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(100):
                    time.sleep(0.05)
                    connection.sendall(b"x")
                connection.sendall(b"\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=drip)
        thread.start()
        deliver(scene)
        thread.join()
    assert kept(scene, hook_id) == [(1, "no response within 0.5 s", False)]


def test_a_backlog_of_one_receiver_hides_no_other(scene, receiver):
    away = hook(scene, "http://127.0.0.1:1/")
    run = scene.run(scene.submit())
    with scene.database.write() as session:
        for _ in range(300):
            webhooks.enqueue(session, run, scene.now)
    quick = hook(scene, receiver.url)
    scene.submit()
    deliver(scene)
    assert kept(scene, quick) == [(1, "204", True)]
    assert sum(attempts for attempts, _, _ in kept(scene, away)) <= AT_ONCE_PER_WEBHOOK


def test_receivers_take_turns(scene, receiver):
    away = [hook(scene, "http://127.0.0.1:1/") for _ in range(AT_ONCE + 1)]
    for _ in range(3):
        scene.submit()
    scene.now += 1
    quick = hook(scene, receiver.url)
    scene.submit()
    with contextlib.closing(Deliveries(scene.database, Outgoing(allow_private=True), clock=lambda: scene.now)) as deliveries:
        for rounds in range(1, 3):
            deliveries.round(scene.now + 3600)      # what has failed is due again too
            eventually(lambda rounds=rounds: AT_ONCE * rounds == sum(
                attempts for each in (*away, quick) for attempts, _, _ in kept(scene, each)))
    assert kept(scene, quick) == [(1, "204", True)]


def test_the_connection_goes_to_the_address_that_was_checked():
    """A name that means another address a moment later gains nothing; the certificate asked for is still the name's."""
    answers = [["93.184.215.14"], ["127.0.0.1"]]
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200)

    outgoing = Outgoing(resolve=lambda *_: answers.pop(0), transport=httpx.MockTransport(answer))
    assert outgoing.post("https://hooks.example.org:8443/a?b=c", b"{}", {}) == 200
    with pytest.raises(Undeliverable, match="not a public address"):
        outgoing.post("https://hooks.example.org:8443/a?b=c", b"{}", {})
    [request] = seen
    assert str(request.url) == "https://93.184.215.14:8443/a?b=c"
    assert request.headers["Host"] == "hooks.example.org:8443"
    assert request.extensions["sni_hostname"] == "hooks.example.org"


@pytest.mark.parametrize("url", [
    "http://127.0.0.1/", "http://[::1]/", "http://[::ffff:7f00:1]/", "http://0x7f000001/", "http://2130706433/", "http://127.1/",
    "http://localhost/", "http://169.254.169.254/latest/meta-data/", "http://0/", "http://user:secret@127.0.0.1/", "ftp://1.1.1.1/",
    "http://", "http:///x", "file:///etc/passwd", "http://exa mple/", "http://[::1", "no url", "http://1.1.1.1:99999/"])
def test_no_spelling_of_an_address_of_ours_gets_through(url):
    with pytest.raises(Undeliverable):
        Outgoing().post(url, b"{}", {})


def test_ipv6_addresses_are_reached_as_such():
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        return httpx.Response(200)

    Outgoing(resolve=lambda *_: ["2606:4700::1"], transport=httpx.MockTransport(answer)).post("http://example.org/", b"", {})
    assert seen == ["http://[2606:4700::1]/"]


def test_housekeeping_forgets_what_is_old_and_settled(scene, receiver):
    hook_id, away = hook(scene, receiver.url), hook(scene, "http://127.0.0.1:1/")
    run_id = scene.submit()
    deliver(scene)
    with scene.database.write() as session:
        idempotency.remember(session, owner="ann", key="k", body_hash=b"0" * 32, run_id=run_id, now=scene.now)
    tidy, day = Housekeeping(scene.database, scene.jobs, scene.settings.roots, 3600.0), 24 * 3600.0
    tidy.round(scene.now + day - 1)
    with scene.database.write() as session:
        assert idempotency.find(session, "ann", "k", scene.now) is not None
    assert len(kept(scene, hook_id)) == 1
    tidy.round(scene.now + 7 * day + 1)
    with scene.database.write() as session:
        assert idempotency.find(session, "ann", "k", scene.now) is None
    assert kept(scene, hook_id) == []
    assert len(kept(scene, away)) == 1, "it is still to be delivered"


def test_a_loop_continues_after_errors_and_runs_at_once_when_woken():
    rounds: list[float] = []

    def work(now: float) -> None:
        rounds.append(now)
        if len(rounds) == 1:
            raise DatabaseUnavailable("gone")
        if len(rounds) == 2:
            raise ZeroDivisionError

    loop = Loop(work, 3600, "test")
    loop.start()
    for count in range(1, 5):
        eventually(lambda count=count: len(rounds) >= count)
        loop.wake()
    loop.stop()
    assert not [thread for thread in threading.enumerate() if thread.name == "test"]


def test_a_loop_that_was_never_started_can_be_stopped():
    Loop(lambda _: None, 1, "test").stop()
