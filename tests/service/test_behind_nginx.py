"""nginx with the literal configuration of docs/operating.md in front of the service; oauth2-proxy has a stand-in."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from api_client import Service, demo, service
from running_service import Running, until

from service.client import Client, RetryPolicy
from service.client.errors import ServiceProblem

NGINX, OPENSSL = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin"), shutil.which("openssl")
DOCUMENT = Path(__file__).parents[2] / "docs" / "operating.md"
EMAIL = "X-Forwarded-Email"
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}
HTML = {"Accept": "text/html,application/xhtml+xml"}
pytestmark = pytest.mark.skipif(not (NGINX and OPENSSL), reason="no nginx; on Debian: apt-get install nginx openssl")


class SignsIn(BaseHTTPRequestHandler):
    """What nginx asks of oauth2-proxy: who a browser with this cookie is, and a page that signs people in."""

    def do_GET(self) -> None:
        name = re.search(r"_oauth2_proxy=([\w.@]+)", self.headers.get("Cookie", ""))
        if self.path != "/oauth2/auth":
            self.send_response(200)
        elif name is None:
            self.send_response(401)
        else:
            self.send_response(202)
            self.send_header("X-Auth-Request-Email", name[1])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Be silent."""


@contextlib.contextmanager
def signing_in() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SignsIn)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def documented(ports: dict[str, int], home: Path) -> str:
    """The configuration of the document, with its parts for sign-in, with other ports, names and files."""
    plain, sign_in = re.findall(r"```nginx\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    place = "    location / {\n        proxy_pass http://127.0.0.1:8300;\n    }\n"
    assert place in plain
    text = plain.replace(place, sign_in) if "4180" in ports else plain
    text = text.replace("listen 443", f"listen 127.0.0.1:{ports['443']}").replace("/etc/ssl", str(home))
    for port in ports.keys() - {"443"}:
        text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ports[port]}")
    return text


@contextlib.contextmanager
def nginx(home: Path, server: str, port: int) -> Iterator[None]:
    name = home / "moedisco"
    subprocess.run(
        [
            *(OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
        ],
        check=True,
        capture_output=True,
    )
    places = "\n".join(
        f"{kind}_temp_path {home}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.getuid() == 0 else ""  # the folder of a test is its own user's
    (home / "nginx.conf").write_text(
        f"{user} daemon off; pid {home}/pid; error_log {home}/error.log; events {{}}\n"
        f"http {{ access_log off;\n{places}\n{server} }}\n"
    )
    process = subprocess.Popen([NGINX, "-c", home / "nginx.conf", "-e", home / "error.log"])
    try:
        until(lambda: listens(port) or process.poll() is not None)
        assert process.poll() is None, (home / "error.log").read_text()
        yield
    finally:
        process.terminate()
        process.wait(10)


def listens(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Front:
    """The service behind nginx: `url` is what people know, `certificate` the file that clients trust."""

    def __init__(self, api: Service, running: Running, home: Path, url: str) -> None:
        self.api, self.running, self.url = api, running, url
        self.tls = ssl.create_default_context(cafile=str(home / "moedisco.pem"))

    def browser(self, name: str | None = None, **headers: str) -> httpx.Client:
        cookies = {} if name is None else {"_oauth2_proxy": name}
        return httpx.Client(base_url=self.url, verify=self.tls, cookies=cookies, headers=headers)

    def client(self, who: str, seconds: float = 10) -> Client:
        retry = RetryPolicy(seconds=seconds, first_wait=0.05, longest_wait=0.2)
        return Client(self.url, self.api.plain[who], retry=retry, transport=httpx.AsyncHTTPTransport(verify=self.tls))


@pytest.fixture(scope="module", params=[True, False], ids=["sign-in", "plain"])
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    home, port = tmp_path_factory.mktemp("nginx"), free_port()
    settings = {"sign_in_header": EMAIL} if request.param else {}
    public = {"public_url": f"https://localhost:{port}", "forwarded_allow_ips": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(service(home, **public, **settings))
        running = Running(api)
        stack.callback(running.stop)
        running.start()
        ports = {"443": port, "8300": running.port}
        if request.param:
            ports["4180"] = stack.enter_context(signing_in())
        stack.enter_context(nginx(home, documented(ports, home), port))
        yield Front(api, running, home, public["public_url"])


@pytest.mark.parametrize("front", [True], indirect=True, ids=["sign-in"])
def test_people_are_who_the_proxy_says(front: Front) -> None:
    with front.browser("ann@example.org", **{EMAIL: "root"}) as ann:
        assert ann.get("/v1/identity").json()["owner"] == "ann@example.org"
        assert ann.post("/v1/runs", json={"config": demo()}).status_code == 403  # not from the page
        run = ann.post("/v1/runs", json={"config": demo()}, headers=OWN_PAGE).raise_for_status().json()
        assert ann.get("/", headers=HTML).status_code == 200
    with front.browser("bob@example.org") as bob:
        assert bob.get(f"/v1/runs/{run['id']}").status_code == 404


@pytest.mark.parametrize("front", [True], indirect=True, ids=["sign-in"])
def test_who_has_not_signed_in_is_sent_to_sign_in_whatever_header_they_send(front: Front) -> None:
    with front.browser(**{EMAIL: "root"}) as nobody:
        page = nobody.get("/?x=1", headers=HTML)
        assert (page.status_code, page.headers["location"]) == (302, f"{front.url}/oauth2/start?rd={front.url}/?x=1")
        assert nobody.get("/oauth2/start").status_code == 200
        assert nobody.get("/v1/identity").status_code == 401
        assert nobody.post("/v1/runs", json={"config": demo()}, headers=OWN_PAGE).status_code == 401
        assert nobody.get("/oauth2/auth").status_code == 404  # nginx alone asks there


def test_programs_and_drivers_pass_with_what_they_have(front: Front, tmp_path: Path) -> None:
    with front.browser(Authorization=f"Bearer {front.api.plain['bob']}", **{EMAIL: "root"}) as program:
        # Without sign-in nginx hands the header on, and the service gives it no meaning.
        assert program.get("/v1/identity").json()["owner"] == "bob"
    text = tmp_path / "a.txt"
    text.write_bytes(b"a text\n" * 2_000_000)
    assert front.client("bob").upload_dataset(text).bytes == text.stat().st_size
    with front.browser() as driver:
        refused = driver.post("/v1/runs/01ARZ3NDEKTSV4RRFFQ69G5FAV/report", json={"first": 0, "events": []})
        assert refused.headers["content-type"] == "application/problem+json"
        assert driver.get("/metrics").status_code == 403
        assert driver.get(f"http://127.0.0.1:{front.running.port}/metrics").status_code == 200


def test_events_arrive_when_they_happen_and_after_a_restart(front: Front) -> None:
    client = front.client("ann", seconds=30)
    run = client.submit(demo())
    front.api.start(run.id)
    front.running.report(run.id, 0, 3)
    seen: list[tuple[int, float]] = []
    reader = threading.Thread(target=lambda: seen.extend(first_events(client, run.id, 6)))
    reader.start()
    time.sleep(0.3)
    front.running.stop()
    with pytest.raises(ServiceProblem, match=r"^HTTP 502 Bad Gateway: a proxy gets no answer from the service; look"):
        front.client("ann", seconds=0).run(run.id)
    front.running.start()
    front.running.report(run.id, 3, 3)
    sent = time.monotonic()
    reader.join(20)
    steps = [step for step, _ in seen]
    assert steps == [0, 1, 2, 3, 4, 5]
    assert seen[-1][1] - sent < 3  # nginx keeps none back


def first_events(client: Client, run_id: str, count: int) -> list[tuple[int, float]]:
    """The first progress events of a run: their steps, and when they arrived."""
    found: list[tuple[int, float]] = []
    for _, event in client.events(run_id):
        if event.type == "progress":
            found.append((event.data["step"], time.monotonic()))
        if len(found) == count:
            break
    return found
