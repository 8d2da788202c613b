"""Notices about ends of runs reach the URL of the project, and no address of the service's own network."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import Service, service
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from receiver import Receiver
from reconciling import SECRET, Scene

from service import notices as sending
from service.background.notices import Notices
from service.database import notices, projects
from service.database.session import Database
from service.domain.access import Person
from service.domain.notices import PRODUCTS, check_url, without_secret
from service.domain.states import RunState

HOUR = 3600.0


def certificate(place: Path) -> Path:
    """A certificate for `localhost`, with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = place / "certificate.pem"
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + secret)
    return path


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A receiver with TLS, whose certificate is trusted."""
    path = certificate(tmp_path)
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(path)
    trusted = ssl.create_default_context(cafile=path)
    monkeypatch.setattr(sending, "_client", lambda: httpx.Client(verify=trusted, trust_env=False))
    with Receiver() as server:
        server.socket = served.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def scene(database: Database, tmp_path: Path) -> Scene:
    return Scene.on(database, tmp_path)


def hook(receiver: Receiver) -> str:
    return f"https://localhost:{receiver.server_address[1]}/hook/secret-part"


def sender(scene: Scene, allows: Any = lambda _: True) -> Notices:
    return Notices(scene.database, SECRET, "https://moedisco.example.org", allows=allows)


def put(scene: Scene, url: str, name: str = "ann") -> str:
    """Set the URL of a project of ann's, made if there is none; returns the project's id."""
    with scene.database.write() as session:
        found = [row for row, _ in projects.find(session, Person("ann"), name)]
        row = found[0] if found else projects.create(session, "ann", name, scene.now, 10)
        notices.put(session, SECRET, row.id, url, "https://localhost/...", by="ann", now=scene.now)
        return row.id


def ended(scene: Scene, **columns: Any) -> str:
    run_id = scene.submit()
    scene.now += 1
    scene.change(run_id, RunState.CANCELLED, **columns)
    return run_id


def test_the_end_of_a_run_is_sent_once_with_state_verdict_price_and_link(scene: Scene, receiver: Receiver) -> None:
    early = ended(scene)
    scene.now += 1
    put(scene, hook(receiver))
    parent = ended(scene, held_out_loss=3.45)
    run_id = ended(scene, parent=parent, held_out_loss=3.41, perplexity=30.27, dollars=12.3, hours=2.5)
    for _ in range(2):
        sender(scene).round(scene.now)
    messages = [json.loads(body) for _, body in receiver.got]
    assert [message["run"]["id"] for message in messages] == [parent, run_id]
    assert early not in str(messages)
    assert messages[1]["text"] == (
        "demo cancelled in 2 h 30 min for $12.30. Held-out loss 3.4100 (perplexity 30.27), parent 3.4500. "
        f"https://moedisco.example.org/#/runs/{run_id}"
    )
    assert receiver.got[1][0]["Host"] == hook(receiver).split("/")[2]
    with scene.database.read() as session:
        assert notices.get(session, scene.run(run_id).project).sent == scene.now


def test_a_url_that_accepts_nothing_is_tried_again_and_holds_up_no_other(scene: Scene, receiver: Receiver) -> None:
    law = put(scene, "https://localhost:1/closed", "law")
    put(scene, hook(receiver))
    receiver.answers = [302]  # a redirect is not followed
    ended(scene, project=law)
    own = ended(scene)
    sending_them = sender(scene)
    sending_them.round(scene.now)
    with scene.database.read() as session:
        failures = [notices.get(session, each).failure for each in (law, scene.run(own).project)]
    assert failures == ["no answer (ConnectError)", "status 302"]
    for seconds in (1, 6, 20):
        sending_them.round(scene.now + seconds)
    assert receiver.runs == [(own, "cancelled")] * 2
    scene.now += 1
    put(scene, hook(receiver), "law")  # set after the end: no notice
    sender(scene).round(scene.now)
    assert len(receiver.got) == 2


def test_no_address_of_the_own_network_is_connected_to(scene: Scene, receiver: Receiver) -> None:
    put(scene, hook(receiver))
    ended(scene)
    sender(scene, sending.is_public).round(scene.now)
    assert receiver.got == []
    assert sending.send(hook(receiver), "x", {}) == "localhost is no address of the Internet"
    for address in ("127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1", "fe80::1"):
        assert not sending.is_public(address)
    for address in ("::ffff:10.0.0.1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "fd00::1", "ff02::1"):
        assert not sending.is_public(address)
    assert sending.is_public("1.1.1.1")
    assert sending.is_public("2606:4700::1111")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("notices")) as made:
        yield made


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/x", "https://", "https://ann:pw@example.org/", "https://example.org:x/", "file:///etc"),
        *("json://127.0.0.1/", "mailto://a:b@example.org", "slack://a/b/c?template=/etc/passwd", "https://a/\n"),
        "https://example.org/" + "x" * 2000,
    ],
)
def test_other_urls_are_refused_and_not_quoted(api: Service, url: str) -> None:
    with pytest.raises(ValueError):
        check_url(url)
    answer = api.ann.put("/v1/projects/ann/notices", json={"url": url})
    assert answer.status_code == 422
    assert url == "https://" or url not in answer.text


def test_the_url_is_not_shown_whole(api: Service) -> None:
    answers = [
        api.ann.put("/v1/projects/ann/notices", json={"url": "https://localhost/hook/secret-part"}),
        api.ann.get("/v1/projects/ann/notices"),
        api.ann.post("/v1/projects/ann/notices/test"),
        api.admin.get("/v1/audit"),
    ]
    with api.database.read() as session, contextlib.closing(session.connection().engine.raw_connection()) as raw:
        texts = [*(answer.text for answer in answers), *raw.iterdump()]
    answers += [api.ann.delete("/v1/projects/ann/notices"), api.ann.get("/v1/projects/ann/notices")]
    assert [answer.status_code for answer in answers] == [200, 200, 409, 200, 204, 404]
    assert "https://localhost/... did not accept the notice: localhost is no" in answers[2].json()["detail"]
    assert not any("secret-part" in text for text in texts)


@pytest.mark.filterwarnings("ignore:'imghdr':DeprecationWarning")  # apprise imports it
def test_products_are_reached_through_apprise(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    url, sent = "discord://4174216298/JHMHI8qBe7bk2ZwO5U711o3dV_js", []
    assert api.ann.put("/v1/projects/ann/notices", json={"url": "slack://unreadable"}).status_code == 422
    assert api.ann.put("/v1/projects/ann/notices", json={"url": url}).json()["shown"] == "discord://..."
    plugin = type(sending._plugin(url))
    monkeypatch.setattr(plugin, "send", lambda self, body, **_: sent.append((self.redirects, body)) or True)
    assert api.ann.post("/v1/projects/ann/notices/test").status_code == 204
    assert sent[0][0] is False
    assert "This is a test by ann" in sent[0][1]
    monkeypatch.setitem(sys.modules, "apprise", None)
    refused = api.ann.put("/v1/projects/ann/notices", json={"url": url})
    assert (refused.status_code, "moedisco-ray[notify]" in refused.text) == (409, True)
    assert {without_secret(f"{each}://x/secret") for each in PRODUCTS} == {f"{each}://..." for each in PRODUCTS}
