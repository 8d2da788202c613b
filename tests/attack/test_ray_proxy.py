"""The Ray dashboard behind the service, as a tenant and a hostile page would use it."""

import http.client

import pytest
from api_client import service
from dashboard_standin import RAY_TOKEN, dashboard
from running_service import Running


@pytest.fixture(scope="module")
def standin():
    with dashboard() as made:
        yield made


@pytest.fixture
def ray(standin):
    standin.asked.clear()
    return standin


@pytest.fixture(scope="module")
def running(tmp_path_factory, standin):
    """The service on a port, so that requests arrive as they were written."""
    with (
        pytest.MonkeyPatch.context() as patch,
        service(tmp_path_factory.mktemp("ray"), dashboard_url=standin.url, requests_per_minute=100_000) as made,
    ):
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", RAY_TOKEN)
        served = Running(made)
        served.start()
        try:
            yield served
        finally:
            served.stop()


def sent(running, target, *, who="admin", method="GET", headers=(), body=None, host=None):
    """Send a request target as it is, without a client that tidies it up."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
    connection.putrequest(method, target, skip_accept_encoding=True, skip_host=host is not None)
    if host is not None:
        connection.putheader("Host", host)
    connection.putheader("Authorization", f"Bearer {running.made.plain[who]}")
    for name, value in headers:
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8", "replace")
    connection.close()
    return answer, text


TRICKS = (
    "/ray/..%2f..%2fapi/jobs/",
    "/ray/%2e%2e/v1/tokens",
    "/ray/static/%2e%2e/%2e%2e/etc/passwd",
    "/ray/static/..%2f..%2fnodes",
    "/ray//169.254.169.254/latest/meta-data",
    "/ray/http://169.254.169.254/",
    "/ray/%2f%2f169.254.169.254/",
    "/ray/@169.254.169.254/",
    "/ray/\\\\169.254.169.254\\x",
    "/ray/api/jobs/%252e%252e/stop",
    "/ray/nodes%00",
    "/ray/nodes%0d%0aX-Injected:%201",
    "/ray/api/jobs/x%2fstop",
    "/ray/nodes%3fview=x",
    "/ray/api/v0/delay/60",
    "/ray/worker/cpu_profile?pid=1",
    "/ray/test/dump",
    "/ray/api/packages/gcs/x.zip",
    "/ray/api/authenticate",
    "/ray/api/train/v2/runs/v1",
    "/ray/api/serve/applications/../../jobs/",
)


@pytest.mark.parametrize("target", TRICKS)
def test_path_tricks_reach_no_other_path_and_no_other_host(running, ray, target):
    answer, text = sent(running, target)
    assert answer.status in (400, 404), text
    assert not ray.asked


@pytest.mark.parametrize("target", ["http://169.254.169.254/ray/nodes", "//169.254.169.254/ray/nodes"])
def test_an_absolute_target_chooses_no_host(running, ray, target):
    ray.answers("/nodes", {"ours": True})
    answer, text = sent(running, target)
    assert (answer.status == 200 and "ours" in text) or answer.status in (400, 404)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE"])
def test_no_job_is_submitted_or_stopped_through_the_service(running, ray, method):
    for target in ("/ray/api/jobs/", "/ray/api/jobs/x/stop", "/ray/api/jobs/x"):
        answer, _ = sent(
            running,
            target,
            method=method,
            body=b'{"entrypoint": "id"}',
            headers=[("Content-Type", "application/json"), ("X-HTTP-Method-Override", "POST")],
        )
        assert answer.status in (400, 405)
    assert not ray.asked


@pytest.mark.parametrize("who", ["ann", "bob", "reader"])
def test_a_tenant_sees_nothing_of_ray(running, ray, who):
    for target in ("/ray/", "/ray/api/jobs/", "/ray/static/js/main.js", "/ray/nothing"):
        answer, text = sent(running, target, who=who)
        assert answer.status == 403
        assert RAY_TOKEN not in text
    assert not ray.asked


def test_headers_choose_neither_host_nor_identity(running, ray):
    answer, _ = sent(
        running,
        "/ray/api/jobs/",
        headers=[
            ("Cookie", "ray-authentication-token=theirs; moedisco_session=theirs"),
            ("X-Ray-Authorization", "Bearer theirs"),
            ("X-Forwarded-Host", "evil.example"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("Forwarded", "host=evil.example"),
            ("Connection", "Authorization, X-Hop"),
            ("X-Hop", "1"),
            ("Upgrade", "websocket"),
            ("TE", "trailers"),
            ("Proxy-Authorization", "Basic x"),
            ("Origin", "https://evil.example"),
        ],
    )
    assert answer.status == 200
    [(_, _, headers)] = ray.asked
    assert headers.pop("authorization") == f"Bearer {RAY_TOKEN}"
    assert headers.pop("host") == ray.url.removeprefix("http://")
    assert set(headers) <= {"accept", "accept-encoding", "connection", "user-agent"}
    assert headers.get("connection", "close") in ("close", "keep-alive")


def test_answers_bring_no_token_cookie_or_permission(running, ray):
    for target in ("/ray/", "/ray/api/jobs/", "/ray/static/js/main.js", "/ray/favicon.ico"):
        answer, text = sent(running, target)
        everything = repr(answer.getheaders()) + text
        assert RAY_TOKEN not in everything
        assert running.made.plain["admin"] not in everything
        assert not {"set-cookie", "access-control-allow-origin", "x-hop"} & {
            name.lower() for name, _ in answer.getheaders()
        }


def test_a_host_header_adds_nothing_to_the_policy(running):
    answer, _ = sent(running, "/ray/", host="x; script-src *")
    assert answer.status == 400 or "script-src *" not in answer.getheader("Content-Security-Policy")
