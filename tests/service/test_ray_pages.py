"""The Ray dashboard through the service."""

import contextlib

import httpx
import pytest
from api_client import service
from dashboard_standin import INDEX, RAY_TOKEN, dashboard

from service.ray_side.dashboard import Dashboard
from service.ray_side.pages import kind_of
from service.serve import _ray
from service.settings import Settings


@pytest.fixture
def ray():
    with dashboard() as standin:
        yield standin


@pytest.fixture
def api(tmp_path, ray, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", RAY_TOKEN)
    with service(tmp_path, dashboard_url=ray.url, public_url="https://moe.example.org") as made:
        yield made


def test_an_administrator_reads_the_dashboard_with_rays_token_and_none_of_the_service(api, ray):
    answer = api.admin.get("/ray/", headers={"Cookie": "moedisco_session=x"})
    assert (answer.status_code, answer.text) == (200, INDEX)
    [(method, path, headers)] = ray.asked
    assert (method, path) == ("GET", "/")
    assert headers["authorization"] == f"Bearer {RAY_TOKEN}"
    assert api.plain["admin"] not in repr(headers)
    assert "cookie" not in headers
    assert headers["user-agent"].startswith("Mozilla"), "Ray hides environment variables from browsers only"


def test_the_dashboards_scripts_reach_nothing_but_the_dashboard(api):
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in api.admin.get("/ray/").headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"].split() == ["https://moe.example.org/ray/", "http://testserver/ray/"]
    assert policy["script-src"] == policy["connect-src"]
    assert policy["form-action"] == policy["frame-src"] == policy["worker-src"] == policy["frame-ancestors"] == "'none'"
    assert set(policy["sandbox"].split()) == {"allow-scripts", "allow-same-origin", "allow-downloads"}, (
        "no further windows"
    )


def test_what_a_run_wrote_runs_no_script_on_the_services_origin(api, ray):
    ray.answers("/api/v0/logs/file", b"<script>fetch('/v1/tokens')</script>", Content_Type="text/html")
    answer = api.admin.get("/ray/api/v0/logs/file?node_id=n&filename=a.html")
    assert answer.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ray.paths() == ["/api/v0/logs/file?node_id=n&filename=a.html"]


def test_bodies_and_their_descriptions_arrive_as_they_were_sent(api, ray):
    ray.answers(
        "/static/js/main.js", b"\x1f\x8bpacked", Content_Type="text/javascript", Content_Encoding="br", ETag='"1"'
    )
    with api.admin.stream(
        "GET", "/ray/static/js/main.js", headers={"Accept-Encoding": "br", "If-None-Match": '"0"'}
    ) as answer:
        assert b"".join(answer.iter_raw()) == b"\x1f\x8bpacked"
    assert answer.headers["content-encoding"] == "br"
    assert answer.headers["etag"] == '"1"'
    assert answer.headers["cache-control"] == "private, max-age=3600"
    assert ray.asked[0][2]["if-none-match"] == '"0"'
    assert api.admin.head("/ray/api/jobs/").headers["content-length"] == str(len(b'[{"submission_id": "a-1"}]'))
    assert ray.asked[-1][0] == "HEAD"


def test_the_address_without_a_slash_leads_to_the_one_with(api):
    answer = api.admin.get("/ray", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (307, "ray/")


def test_a_dashboard_that_is_away_or_moved_is_a_problem_document(api, ray, monkeypatch):
    ray.answers("/nodes", b"", 302, Location="http://169.254.169.254/")
    assert api.admin.get("/ray/nodes").status_code == 503
    ray.answers("/nodes", b"", 401)
    assert api.admin.get("/ray/nodes").json()["type"] == "urn:moedisco:problem:ray-unavailable"


def test_every_path_of_a_page_is_known():
    pages = (
        "",
        "favicon.ico",
        "static/js/main.84605326.js",
        "static/media/x.woff2",
        "nodes",
        "nodes/9f0a",
        "logical/actors/1a",
        "api/jobs/",
        "api/jobs/01J-1",
        "api/jobs/01J-1/logs",
        "api/v0/tasks",
        "api/v0/tasks/timeline",
        "api/data/datasets/01",
    )
    assert all(kind_of(page) for page in pages)
    others = (
        "api/jobs/x/stop",
        "worker/cpu_profile",
        "memory_profile",
        "api/packages/gcs/x",
        "api/v0/delay/9",
        "test/dump",
        "nodes/",
        "static/../nodes",
        "static//js",
        "//nodes",
        "nodes/..",
        "nodes\n",
        "static/js/é.js",
        "api/authenticate",
        "logs/x",
        "api/train/v2/runs/v1",
    )
    assert not [page for page in others if kind_of(page)]


def test_the_dashboard_may_have_another_address_than_the_jobs(tmp_path, ray):
    settings = Settings(state_dir=tmp_path, ray_address="http://head:8265", dashboard_url=ray.url)
    local, jobs, shown = _ray(settings)
    with contextlib.closing(jobs), contextlib.closing(shown):
        assert (local, jobs.url, shown.url) == (None, "http://head:8265", ray.url)


@pytest.mark.parametrize("who", ["ann", "reader", None])
def test_the_dashboard_is_for_administrators(api, ray, who):
    assert api.client(who).get("/ray/").status_code == (401 if who is None else 403)
    assert not ray.asked


def test_identity_names_the_dashboard_to_administrators_only(api):
    assert api.admin.get("/v1/identity").json()["dashboard_url"] == "/ray/"
    assert api.ann.get("/v1/identity").json()["dashboard_url"] is None


def test_tokens_are_read_anew(tmp_path):
    path = tmp_path / "token"
    path.write_text("one")
    with contextlib.closing(Dashboard("http://127.0.0.1:1", path)) as client:
        assert client.headers() == {"Authorization": "Bearer one"}
        path.write_text("two\n")
        assert httpx.Headers(client.headers())["authorization"] == "Bearer two"
