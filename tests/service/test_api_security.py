import time

import pytest
from api_client import demo, service
from pydantic import ValidationError
from starlette.testclient import TestClient

from service.api.limits import RateLimiter
from service.api.server import behind_proxies
from service.database import tokens
from service.errors import TooMany
from service.settings import Settings


def session_of(api, who="ann", **headers):
    client = api.client(None, base_url="http://testserver")
    assert client.post("/v1/session", json={"token": api.plain[who]}, headers=headers).status_code == 204
    return client


def test_every_route_of_the_api_wants_a_token(api):
    for path, operations in api.anonymous.get("/openapi.json").json()["paths"].items():
        for method in operations:
            if path.startswith("/v1") and path != "/v1/session":
                real = path.replace("{name}", "demo" if "presets" in path else "driver")
                answer = api.anonymous.request(method, real, json={} if method in ("post", "put", "patch") else None)
                assert answer.status_code == 401, (method, path)
                assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer mdk_wrong", "Basic YTpi", "Bearer " + "x" * 5000, "mdk_x"]
)
def test_what_is_no_token_is_refused(shared, header):
    answer = shared.anonymous.get("/v1/identity", headers={"Authorization": header})
    assert (answer.status_code, answer.json()["title"]) == (401, "Not signed in")


def test_expired_and_revoked_tokens_are_refused(api):
    with api.database.write() as session:
        plain, _ = tokens.create(
            session, name="x", owner="ann", scopes=["read"], expires=time.time() - 1, now=time.time() - 9
        )
    assert api.anonymous.get("/v1/identity", headers={"Authorization": f"Bearer {plain}"}).status_code == 401
    made = api.admin.post("/v1/tokens", json={"name": "ci", "owner": "ann", "scopes": ["read"]}).json()
    mine = {"Authorization": f"Bearer {made['token']}"}
    assert api.anonymous.get("/v1/identity", headers=mine).status_code == 200
    assert api.admin.delete(f"/v1/tokens/{made['id']}").status_code == 204
    assert api.anonymous.get("/v1/identity", headers=mine).status_code == 401


def test_scopes_hold_those_before_them(api):
    assert api.admin.get("/v1/identity").json()["scopes"] == ["read", "submit", "admin"]
    assert api.ann.get("/v1/identity").json()["scopes"] == ["read", "submit"]
    assert api.reader.get("/v1/identity").json()["scopes"] == ["read"]


def test_a_scope_that_is_missing_is_named(api):
    answer = api.reader.post("/v1/runs", json={"config": demo()})
    assert (answer.status_code, "'submit'" in answer.json()["detail"]) == (403, True)
    for method, path in (("GET", "/v1/audit"), ("POST", "/v1/tokens"), ("PUT", "/v1/policies")):
        bodies = {"POST": {"name": "x", "owner": "x", "scopes": ["read"]}, "PUT": {}}
        assert api.ann.request(method, path, json=bodies.get(method)).status_code == 403


def test_a_session_is_a_cookie_that_scripts_cannot_read(api):
    answer = api.anonymous.post("/v1/session", json={"token": api.plain["ann"]})
    cookie = answer.headers["set-cookie"].lower()
    assert all(
        part in cookie for part in ("moedisco_session=mds_", "httponly", "samesite=strict", "max-age=", "path=/")
    )
    assert "secure" not in cookie
    secure = api.client(None, base_url="https://testserver").post("/v1/session", json={"token": api.plain["ann"]})
    assert "secure" in secure.headers["set-cookie"].lower()


def test_a_session_reads_and_ends(api):
    client = session_of(api)
    assert client.get("/v1/identity").json()["owner"] == "ann"
    assert client.delete("/v1/session", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 204
    assert client.get("/v1/identity").status_code == 401


def test_a_wrong_token_makes_no_session(api):
    assert api.anonymous.post("/v1/session", json={"token": "mdk_no"}).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, 201),
        ({"Origin": "http://testserver"}, 201),
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[broken"}, 403),
    ],
)
def test_a_session_changes_something_only_from_the_page_itself(shared, headers, status):
    answer = session_of(shared).post("/v1/runs", json={"config": demo()}, headers=headers)
    assert answer.status_code == status


def test_another_site_cannot_sign_a_browser_in(api):
    answer = api.anonymous.post(
        "/v1/session", json={"token": api.plain["ann"]}, headers={"Sec-Fetch-Site": "cross-site"}
    )
    assert answer.status_code == 403


def test_every_answer_has_security_headers(api):
    for path in ("/", "/v1/runs", "/nowhere", "/openapi.json", "/healthz"):
        headers = api.anonymous.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert headers["x-request-id"]


def test_a_request_keeps_a_plain_id_of_its_own(api):
    assert api.anonymous.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert api.anonymous.get("/healthz", headers={"X-Request-ID": "a b\x01"}).headers["x-request-id"] != "a b\x01"


def test_too_many_requests_are_answered_with_a_time_to_try_again(tmp_path):
    with service(tmp_path, requests_per_minute=3) as api:
        answers = [api.ann.get("/v1/identity") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert answers[1].headers["ratelimit-policy"] == '"requests";q=3;w=60'
        assert answers[1].headers["ratelimit"].startswith('"requests";r=1;t=')
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert api.bob.get("/v1/identity").status_code == 200
        assert api.anonymous.get("/healthz").status_code == 200


def test_guessing_tokens_is_limited_by_address(tmp_path):
    with service(tmp_path, requests_per_minute=3) as api:
        guesses = [
            api.anonymous.get("/v1/identity", headers={"Authorization": f"Bearer mdk_{i}"}).status_code
            for i in range(4)
        ]
        assert guesses == [401, 401, 401, 429]
        assert api.ann.get("/v1/identity").status_code == 200


def test_a_bucket_fills_evenly_and_never_above_its_brim():
    clock = [0.0]
    limits = RateLimiter(60, lambda: clock[0])
    for _ in range(60):
        limits.take("a")
    with pytest.raises(TooMany) as caught:
        limits.take("a")
    assert caught.value.retry_after == pytest.approx(1.0)
    clock[0] = 1.0
    limits.take("a")
    with pytest.raises(TooMany):
        limits.take("a")
    clock[0] = 1000.0
    for _ in range(60):
        limits.take("a")
    with pytest.raises(TooMany):
        limits.take("a")


def test_buckets_do_not_pile_up():
    limits = RateLimiter(60, lambda: 0.0)
    for i in range(25_000):
        limits.take(str(i))
    assert len(limits._buckets) <= 10_000


def test_a_person_makes_rotates_and_revokes_own_tokens_with_at_most_the_own_scope(api):
    def asked(who, method, path, **body):
        return api.client(who).request(method, f"/v1/tokens{path}", json=body or None)

    made = asked("reader", "POST", "", name="laptop", scopes=["read"])
    assert (made.status_code, made.json()["owner"]) == (201, "ann")
    place = f"/{made.json()['id']}"
    assert made.json()["id"] in {each["id"] for each in asked("ann", "GET", "").json()["items"]}
    assert {each["owner"] for each in asked("ann", "GET", "").json()["items"]} == {"ann"}
    for who, more in (
        ("reader", {"scopes": ["submit"]}),
        ("ann", {"scopes": ["admin"]}),
        ("ann", {"scopes": ["read"], "owner": "bob"}),
        ("ann", {"scopes": ["read"], "expires_in_days": None}),
    ):
        assert asked(who, "POST", "", name="x", **more).status_code == 403, more
    strange, absent = asked("bob", "POST", f"{place}/rotate"), asked("bob", "POST", "/absent/rotate")
    assert (strange.status_code, strange.json()["detail"]) == (404, absent.json()["detail"])
    assert asked("bob", "DELETE", place).status_code == 404
    api.plain["laptop"] = made.json()["token"]
    session = session_of(api, "laptop")
    same = {"Sec-Fetch-Site": "same-origin"}
    assert session.post(f"/v1/tokens{place}/rotate", headers=same).status_code == 403
    rotated = asked("laptop", "POST", f"{place}/rotate").json()
    assert (rotated["id"], rotated["name"], rotated["scopes"]) == (made.json()["id"], "laptop", ["read"])
    assert rotated["expires"] - rotated["created"] == pytest.approx(90 * 86_400)
    assert asked("laptop", "GET", "").status_code == session.get("/v1/identity").status_code == 401
    api.plain["laptop"] = rotated["token"]
    [wider] = [each["id"] for each in asked("ann", "GET", "").json()["items"] if each["name"] == "ann"]
    for method, path in (("POST", f"/{wider}/rotate"), ("DELETE", f"/{wider}")):
        assert asked("laptop", method, path).status_code == 403
    assert asked("laptop", "DELETE", place).status_code == 204
    assert asked("laptop", "GET", "").status_code == 401
    assert asked("ann", "POST", f"{place}/rotate").status_code == 409


PROXY = {"forwarded_allow_ips": "10.0.0.9, 10.1.0.0/16", "sign_in_header": "X-Forwarded-Email"}
ANN = {"X-Forwarded-Email": "ann@example.org", "X-Forwarded-For": "203.0.113.5"}
OWN_PAGE = {"Sec-Fetch-Site": "same-origin"}


def test_a_trusted_proxys_header_signs_in_and_that_of_another_address_is_refused(tmp_path):
    with service(tmp_path, **PROXY) as api:
        app = behind_proxies(api.app, api.settings)

        def client(address, **headers):
            return TestClient(app, client=(address, 1), headers=headers)

        for address in ("10.0.0.9", "::ffff:10.1.2.3"):
            found = client(address, **ANN).get("/v1/identity").json()
            assert (found["owner"], found["scopes"]) == ("ann@example.org", ["read", "submit"])
        for address in ("10.0.0.8", "203.0.113.5", "testclient"):
            bearer = {"Authorization": f"Bearer {api.plain['admin']}"}
            for headers in (ANN, ANN | bearer, ANN | {"X-Forwarded-For": "10.0.0.9"}):
                refused = client(address, **headers).get("/v1/identity")
                assert (refused.status_code, "own proxy alone" in refused.json()["detail"]) == (401, True)
        assert TestClient(api.app, headers=ANN).get("/v1/identity").status_code == 401  # a server that marks nothing
        proxied = client("10.0.0.9", **ANN)
        assert client("10.0.0.9").get("/v1/identity").status_code == 401
        for name in ("ann example", "x" * 65, "", "a, b"):
            assert client("10.0.0.9", **{"X-Forwarded-Email": name}).get("/v1/identity").status_code == 401
        twice = [("X-Forwarded-Email", "ann@example.org"), ("X-Forwarded-Email", "root")]
        assert TestClient(app, client=("10.0.0.9", 1)).get("/v1/identity", headers=twice).status_code == 401

        # As a session: changes come from the page itself, and no lasting credential is made.
        assert proxied.post("/v1/runs", json={"config": demo()}).status_code == 403
        assert proxied.post("/v1/runs", json={"config": demo()}, headers=OWN_PAGE).status_code == 201
        assert proxied.post("/v1/sign-in-codes", headers=OWN_PAGE).status_code == 403
        token = {"name": "x", "scopes": ["read"]}
        assert proxied.post("/v1/tokens", json=token, headers=OWN_PAGE).status_code == 403
        large = {"config": demo(tags={str(i): "x" * 200 for i in range(200)})}
        assert proxied.post("/v1/estimates", json=large, headers=OWN_PAGE).status_code == 422  # it was read

        # A token, and a session that was started with one, come before the header.
        bearer = {"Authorization": f"Bearer {api.plain['admin']}"}
        assert proxied.get("/v1/identity", headers=bearer).json()["owner"] == "root"
        proxied.post("/v1/session", json={"token": api.plain["bob"]}, headers=OWN_PAGE).raise_for_status()
        assert proxied.get("/v1/identity").json()["owner"] == "bob"
        proxied.delete("/v1/session", headers=OWN_PAGE).raise_for_status()

        [row] = [each for each in api.admin.get("/v1/tokens").json()["items"] if each["owner"] == "ann@example.org"]
        assert (row["name"], row["scopes"]) == ("sign-in by proxy", ["submit"])
        api.admin.delete(f"/v1/tokens/{row['id']}").raise_for_status()
        assert "revoked" in client("10.0.0.9", **ANN).get("/v1/identity").json()["detail"]


def test_without_the_setting_a_proxys_header_means_nothing(tmp_path):
    with service(tmp_path, forwarded_allow_ips="10.0.0.9") as api:
        app = behind_proxies(api.app, api.settings)
        assert TestClient(app, client=("10.0.0.9", 1), headers=ANN).get("/v1/identity").status_code == 401


@pytest.mark.parametrize("addresses", ["", "*", "proxy.example.org", " , "])
def test_a_sign_in_header_needs_the_proxys_addresses(tmp_path, addresses):
    with pytest.raises(ValidationError, match="--forwarded-allow-ips"):
        Settings(state_dir=tmp_path, forwarded_allow_ips=addresses, sign_in_header="X-Forwarded-Email")
