"""What a thief, another site, and another service on the host can do with a browser's session."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_client import demo, service

from service.database import sessions, tokens

PAGE = {"Sec-Fetch-Site": "same-origin"}
ELSEWHERE = ({"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://testserver:81"}, {})
"""Headers of another site, of another port of the host, and without an origin."""


def signed_in(api, who="ann", base="http://testserver", **cookies):
    browser = api.client(None, base_url=base, cookies=cookies)
    assert browser.post("/v1/session", json={"token": api.plain[who]}, headers=PAGE).status_code == 204
    return browser


def thief_of(api, browser, base="http://testserver"):
    """A client with a copy of a browser's cookies, which says whatever helps."""
    return api.client(None, base_url=base, cookies=dict(browser.cookies))


def cookie_of(browser):
    [(_, value)] = browser.cookies.items()
    return value


def test_no_token_is_in_the_cookie_and_no_session_in_the_database(api, tmp_path):
    browser = signed_in(api)
    value = cookie_of(browser)
    assert api.plain["ann"] not in value
    code = api.ann.post("/v1/sign-in-codes").json()["code"]
    with sqlite3.connect(tmp_path / "state" / "service.sqlite3") as database:
        kept = "\n".join(database.iterdump())
    assert tokens.digest(value).hex().upper() in kept.upper()
    assert tokens.digest(code).hex().upper() in kept.upper()
    assert value not in kept
    assert code not in kept


def test_a_stolen_cookie_is_useless_after_sign_out(api):
    browser = signed_in(api)
    thief = thief_of(api, browser)
    assert thief.get("/v1/identity").status_code == 200
    assert browser.delete("/v1/session", headers=PAGE).status_code == 204
    assert thief.get("/v1/identity").status_code == 401
    assert thief.post("/v1/runs", json={"config": demo()}, headers=PAGE).status_code == 401


def test_the_cookie_of_a_revoked_or_expired_token_is_refused(api):
    made = api.admin.post(
        "/v1/tokens", json={"name": "x", "owner": "ann", "scopes": ["read"], "expires_in_days": 1}
    ).json()
    api.plain["revoked"] = api.plain["expired"] = made["token"]
    browser = signed_in(api, "expired")
    later = api.app.state.context.now() + 2 * 24 * 3600
    with api.database.read() as session:
        assert sessions.find(session, cookie_of(browser), idle=1e9, now=later - 1.5 * 24 * 3600) is not None
        assert sessions.find(session, cookie_of(browser), idle=1e9, now=later) is None
    browser = signed_in(api, "revoked")
    code = api.client("revoked").post("/v1/sign-in-codes").json()["code"]
    assert api.admin.delete(f"/v1/tokens/{made['id']}").status_code == 204
    assert browser.get("/v1/identity").status_code == 401
    assert api.anonymous.post("/v1/session", json={"code": code}).status_code == 401


def test_a_planted_session_does_not_become_the_one_that_signs_in(api):
    attackers = cookie_of(signed_in(api, "bob"))
    for planted in ("mds_chosen", attackers):
        victim = api.client(None, base_url="http://testserver")
        headers = {**PAGE, "Cookie": f"moedisco_session={planted}"}
        answer = victim.post("/v1/session", json={"token": api.plain["ann"]}, headers=headers)
        assert planted not in answer.headers["set-cookie"]
        assert victim.get("/v1/identity").json()["owner"] == "ann"
        thief = api.client(None, base_url="http://testserver", cookies={"moedisco_session": planted})
        assert thief.get("/v1/identity").status_code == 401, "the session from before the sign-in is still valid"


@pytest.mark.parametrize("headers", ELSEWHERE)
def test_another_site_changes_nothing_with_the_cookie(api, headers):
    browser = signed_in(api)
    run = api.submit()["id"]
    for method, path, body in (
        ("POST", "/v1/runs", {"config": demo()}),
        ("POST", f"/v1/runs/{run}/cancel", {}),
        ("DELETE", f"/v1/runs/{run}", None),
        ("DELETE", "/v1/session", None),
        ("DELETE", "/v1/sessions", None),
        ("POST", "/v1/sign-in-codes", None),
    ):
        assert browser.request(method, path, json=body, headers=headers).status_code == 403, path
    assert browser.get("/v1/identity").status_code == 200


def test_a_session_is_worth_no_more_than_its_token_and_cannot_outlive_it(api):
    assert signed_in(api, "reader").post("/v1/runs", json={"config": demo()}, headers=PAGE).status_code == 403
    admin = signed_in(api, "admin")
    assert admin.get("/v1/tokens").status_code == 200
    wanted = {"name": "x", "owner": "eve", "scopes": ["admin"]}
    assert admin.post("/v1/tokens", json=wanted, headers=PAGE).status_code == 403
    assert admin.post("/v1/sign-in-codes", headers=PAGE).status_code == 403
    assert admin.put("/v1/policies", json={}, headers=PAGE).status_code == 403
    assert admin.put("/v1/policies/owners/eve", json={"active_runs": 9}, headers=PAGE).status_code == 403
    assert admin.delete("/v1/policies/owners/ann", headers=PAGE).status_code == 403


def test_session_code_and_token_do_not_stand_in_for_each_other(api):
    session, code = cookie_of(signed_in(api)), api.ann.post("/v1/sign-in-codes").json()["code"]
    for value in (session, code):
        assert api.anonymous.get("/v1/identity", headers={"Authorization": f"Bearer {value}"}).status_code == 401
        assert api.anonymous.post("/v1/session", json={"token": value}).status_code == 401
    for value in (code, api.plain["ann"]):
        assert api.client(None, cookies={"moedisco_session": value}).get("/v1/identity").status_code == 401
    for value in (session, api.plain["ann"]):
        assert api.anonymous.post("/v1/session", json={"code": value}).status_code == 401


def test_a_code_signs_one_browser_in_and_only_for_ten_minutes(api):
    code = api.ann.post("/v1/sign-in-codes").json()["code"]
    with ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda _: api.anonymous.post("/v1/session", json={"code": code}).status_code, range(8))
        )
    assert sorted(found) == [204] + 7 * [401]
    late = api.ann.post("/v1/sign-in-codes").json()
    with api.database.write() as session:
        assert sessions.redeem(session, late["code"], late["expires"]) is None


def test_guessing_codes_and_tokens_is_slowed_down_by_address(tmp_path):
    with service(tmp_path) as api:
        for guess in ({"code": "mdc_"}, {"token": "mdk_"}):
            [(kind, start)] = guess.items()
            found = [api.anonymous.post("/v1/session", json={kind: f"{start}{i}"}) for i in range(22)]
            assert {answer.status_code for answer in found} <= {401, 429}
            assert found[-1].status_code == 429
            assert int(found[-1].headers["retry-after"]) >= 1
        assert api.anonymous.post("/v1/session", json={"token": api.plain["ann"]}).status_code == 204


@pytest.mark.parametrize(
    ("base", "settings"), [("https://testserver", {}), ("http://testserver", {"public_url": "https://moe.example"})]
)
def test_over_https_the_cookie_can_be_planted_by_no_other_host(tmp_path, base, settings):
    with service(tmp_path, **settings) as api:
        answer = api.client(None, base_url=base).post("/v1/session", json={"token": api.plain["ann"]})
        name, _, rest = answer.headers["set-cookie"].partition("=")
        assert name == "__Host-moedisco_session"
        value, *attributes = [part.strip().lower() for part in rest.split(";")]
        assert {"secure", "httponly", "samesite=strict", "path=/"} <= set(attributes)
        assert not any(attribute.startswith("domain") for attribute in attributes)
        value = rest.split(";")[0]
        for sent, status in ((f"__Host-moedisco_session={value}", 200), (f"moedisco_session={value}", 401)):
            assert api.client(None, base_url=base).get("/v1/identity", headers={"Cookie": sent}).status_code == status


def test_a_session_slides_while_it_is_used_and_ends_all_the_same(tmp_path):
    with service(tmp_path, session_idle_hours=1, session_max_hours=3) as api:
        clock = [api.app.state.context.now()]
        object.__setattr__(api.app.state.context, "now", lambda: clock[0])
        used, idle = signed_in(api), signed_in(api)
        for _ in range(5):
            clock[0] += 1799
            assert used.get("/v1/identity").status_code == 200
        assert idle.get("/v1/identity").status_code == 401
        clock[0] += 1860
        assert used.get("/v1/identity").status_code == 401


def test_all_sessions_of_a_token_are_listed_and_ended_at_once(api):
    first, second, other = signed_in(api), signed_in(api), signed_in(api, "bob")
    assert [each["current"] for each in first.get("/v1/sessions").json()["items"]] == [False, True]
    assert len(other.get("/v1/sessions").json()["items"]) == 1
    assert first.delete("/v1/sessions", headers=PAGE).status_code == 204
    assert [browser.get("/v1/identity").status_code for browser in (first, second, other)] == [401, 401, 200]


def test_sessions_do_not_pile_up(api, monkeypatch):
    monkeypatch.setattr(sessions, "MOST_OF_A_TOKEN", 3)
    browsers = [signed_in(api) for _ in range(5)]
    assert [browser.get("/v1/identity").status_code for browser in browsers] == [401, 401, 200, 200, 200]
    with api.database.write() as session:
        sessions.purge(session, idle=1e9, now=api.app.state.context.now() + 1e8)
    assert api.ann.get("/v1/sessions").json()["items"] == []
