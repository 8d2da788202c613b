"""A service below a path (`--public-url https://HOST/tools/moe`), behind proxies that keep or remove the path."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from api_client import Service, demo, service
from dashboard_standin import dashboard
from pydantic import ValidationError
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Receive, Scope, Send

from service.client import Client
from service.settings import Settings

PATH = "/tools/moe"
BASE = f"https://host.example{PATH}"
_NAMED = re.compile(r"""(?:src|href)="([^"#:]+)"|url\("([^":]+)"\)|from "(\.[^"]+)"|import\("(\.[^"]+)"\)""")


class Proxy:
    """Forwards what is below the path, and answers 404 for the rest of the host, as other programs would."""

    def __init__(self, app: ASGIApp, removes: bool) -> None:
        self._app = app
        self._removes = removes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(PATH + "/") and scope["path"] != PATH:
            await PlainTextResponse("another program", 404)(scope, receive, send)
            return
        if self._removes:
            scope = {
                **scope,
                "path": scope["path"][len(PATH) :] or "/",
                "raw_path": scope["raw_path"][len(PATH) :] or b"/",
            }
        await self._app(scope, receive, send)


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("behind")
    with dashboard() as ray, service(home, public_url=BASE, dashboard_url=ray.url) as made:
        yield made


@pytest.fixture(params=[False, True], ids=["keeps the path", "removes the path"])
def proxy(behind: Service, request: pytest.FixtureRequest) -> Proxy:
    return Proxy(behind.app, request.param)


def browser(proxy: Proxy, **headers: str) -> TestClient:
    return TestClient(proxy, base_url="https://host.example", headers=headers)


@pytest.mark.parametrize("page", ["/", "/reference"])
def test_everything_that_a_page_names_is_found_below_the_path(proxy: Proxy, page: str) -> None:
    """The page's files, and the files that these name in turn.

    Before (af276e38): the page named `/static/app.js` and others at the root of the host, where the proxy answers 404.
    """
    waiting, seen = [BASE + page], set[str]()
    client = browser(proxy)
    while waiting:
        url = waiting.pop()
        if url in seen:
            continue
        seen.add(url)
        answer = client.get(url)
        assert answer.status_code == 200, url
        if "/vendor/" not in url and answer.headers["content-type"].startswith(
            ("text/html", "text/css", "text/javascript")
        ):
            # What a script shows is relative to the page, what it imports to the script.
            for shown, *others in _NAMED.findall(answer.text):
                waiting.append(urljoin(BASE + page if shown else url, shown + "".join(others)))
    assert len(seen) > (40 if page == "/" else 5)


def test_the_scripts_ask_for_nothing_at_the_root_of_the_host(behind: Service) -> None:
    """Every path in a script goes through `ask`, `askText`, `followText` or `here`, which make it relative."""
    static = Path(__file__).parents[2] / "service" / "web" / "static"
    rooted = re.compile(r"""(fetch|EventSource)\(\s*[`"']/|(src|href|action)=(\$\{)?[`"']/|url\(["']?/|url: ["']/""")
    files = [
        each for suffix in ("js", "html", "css") for each in static.rglob(f"*.{suffix}") if "vendor" not in each.parts
    ]
    assert len(files) > 40
    assert not [str(each) for each in files if rooted.search(each.read_text())]


def test_the_path_without_a_slash_leads_to_the_page(behind: Service) -> None:
    answer = browser(Proxy(behind.app, removes=False)).get(BASE, follow_redirects=False)
    assert urljoin(BASE, answer.headers["location"]) == f"{BASE}/"


def test_a_browser_signs_in_and_looks_at_a_run(behind: Service, proxy: Proxy) -> None:
    client = browser(proxy, **{"Sec-Fetch-Site": "same-origin"})
    assert client.post(f"{BASE}/v1/session", json={"token": behind.plain["ann"]}).status_code == 204
    made = client.post(f"{BASE}/v1/runs", json={"config": demo()})
    assert made.status_code == 201, made.text
    assert client.get(urljoin(BASE, made.headers["location"])).json()["id"] == made.json()["id"]
    assert client.get(f"{BASE}/v1/runs/{made.json()['id']}/events?follow=false").status_code == 200
    assert client.delete(f"{BASE}/v1/session").status_code == 204


def test_the_ray_dashboard_and_the_links_to_it_are_below_the_path(behind: Service, proxy: Proxy) -> None:
    client = browser(proxy, Authorization=f"Bearer {behind.plain['admin']}")
    moved = client.get(f"{BASE}/ray", follow_redirects=False)
    assert urljoin(f"{BASE}/ray", moved.headers["location"]) == f"{BASE}/ray/"
    page = client.get(f"{BASE}/ray/")
    assert page.status_code == 200
    assert f"{BASE}/ray/" in page.headers["content-security-policy"]


def test_a_problem_and_the_description_know_the_path(behind: Service, proxy: Proxy) -> None:
    client = browser(proxy)
    assert client.get(f"{BASE}/v1/runs").status_code == 401
    assert client.get(f"{BASE}/openapi.json").json()["servers"] == [{"url": PATH}]
    assert client.get("/v1/runs").text == "another program"


@contextlib.contextmanager
def _client(transport: Any, token: str) -> Iterator[Client]:
    with Client(BASE, token, transport=transport) as made:
        yield made


def test_the_client_keeps_the_path(behind: Service, proxy: Proxy) -> None:

    with _client(httpx.ASGITransport(app=proxy), behind.plain["ann"]) as client:
        assert client.identity().owner == "ann"


@pytest.mark.parametrize(
    "url", ["https://h/v1", "https://h/static/x", "https://h/a b", "https://h/x?y", "https://h/x#y", "https://h//x"]
)
def test_a_public_url_that_cannot_work_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValidationError, match="public_url"):
        Settings(state_dir=tmp_path, public_url=url)
