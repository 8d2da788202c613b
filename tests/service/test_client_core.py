import inspect
import json
import pickle
import stat

import httpx
import pytest
from client_standin import PROMPT, RUN, URL, Script, make, problem

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import MoeDiscoError, UserError
from service.client import (
    Address,
    AsyncClient,
    Client,
    RequestRefused,
    RetryPolicy,
    ServiceAway,
    ServiceProblem,
    address_file,
    find_address,
    load_address,
    save_address,
)
from service.client.errors import retry_after
from service.domain.states import RunState

AWAY = httpx.ConnectError("connection refused")
CONFIG = {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}}


def test_both_clients_have_the_same_methods():
    def public(client):
        return {
            name: (inspect.signature(method), method.__doc__)
            for name, method in inspect.getmembers(client, inspect.isfunction)
            if not name.startswith("_")
        }

    blocking, asynchronous = public(Client), public(AsyncClient)
    assert {name: found for name, found in blocking.items() if name != "close"} == {
        name: found for name, found in asynchronous.items() if name != "close"
    }
    assert "close" in blocking
    assert not any(inspect.iscoroutinefunction(getattr(Client, name)) for name in blocking)


def test_a_run_is_submitted_with_what_was_set_and_a_key():
    service = Script([RUN])
    run = make(service).submit(check_config(CONFIG), priority=3, budget_dollars=2.5)
    assert (run.id, run.state) == (RUN["id"], RunState.RUNNING)
    (request,) = service.requests
    assert json.loads(request.content) == {"config": CONFIG, "priority": 3, "budget_dollars": 2.5}
    assert request.headers["authorization"] == "Bearer mdk_test"
    assert len(request.headers["idempotency-key"]) == 32


def test_a_submission_is_repeated_with_the_same_key():
    service = Script([AWAY, problem(503), httpx.ReadError("cut"), RUN])
    client = make(service)
    assert client.submit(CONFIG).id == RUN["id"]
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 1
    assert len(service.requests) == 4
    client.submit(CONFIG)
    assert service.requests[-1].headers["idempotency-key"] != service.requests[0].headers["idempotency-key"]


def test_a_retry_is_repeated_with_its_key():
    service = Script([AWAY, RUN])
    make(service).retry("x", {"seed": 1}, budget_dollars=2)
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 1
    assert json.loads(service.requests[1].content) == {"changes": {"seed": 1}, "budget_dollars": 2, "reuse": "auto"}


@pytest.mark.parametrize("failure", [AWAY, problem(429), problem(502), problem(503), problem(504)])
def test_reading_is_repeated(failure):
    service = Script([failure, failure, RUN])
    assert make(service).run("x").name == "demo"
    assert len(service.requests) == 3


@pytest.mark.parametrize("failure", [AWAY, problem(503), problem(429)])
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.cancel("x"),
        lambda client: client.resume("x"),
        lambda client: client.delete("x"),
        lambda client: client.create_token("n", "o", ["read"]),
        lambda client: client.change("x", priority=1),
        lambda client: client.delete_policy("ann"),
    ],
)
def test_what_is_not_safe_is_sent_once(failure, call):
    service = Script([failure])
    with pytest.raises((ServiceAway, ServiceProblem)):
        call(make(service))
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500])
def test_what_will_not_pass_is_not_repeated(status):
    service = Script([problem(status, "no")])
    with pytest.raises(ServiceProblem, match="no") as caught:
        make(service).run("x")
    assert caught.value.status == status
    assert isinstance(caught.value, UserError) == (status < 500)
    assert len(service.requests) == 1


def test_retries_end_with_the_address_and_the_remedy():
    service = Script([AWAY])
    with pytest.raises(ServiceAway) as caught:
        make(service, RetryPolicy(seconds=0.05, first_wait=0.01)).pools()
    assert len(service.requests) > 1
    assert str(caught.value) == (
        f"no service answers at {URL} (connection refused); start one with `moedisco serve`, "
        "or set MOEDISCO_URL to where it runs"
    )


def test_a_wait_longer_than_the_retry_policy_is_not_waited_for():
    service = Script([problem(429, "too many", headers={"Retry-After": "3600"})])
    with pytest.raises(ServiceProblem, match="too many"):
        make(service).run("x")
    assert len(service.requests) == 1


def test_mistakes_are_told_as_the_command_line_tells_them():
    service = Script(
        [problem(422, "2 mistakes", [("config.tokens.total", "must be above 0"), ("priority", "is\nlow")])]
    )
    with pytest.raises(RequestRefused) as caught:
        make(service).submit(CONFIG)
    assert str(caught.value) == "tokens.total: must be above 0; priority: is low"
    assert (caught.value.field, caught.value.remedy) == ("config.tokens.total", "must be above 0")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_refused_token_names_the_remedy():
    with pytest.raises(RequestRefused, match="token expired; set MOEDISCO_TOKEN to a valid token"):
        make(Script([problem(401, "token expired")])).identity()


def test_another_program_at_the_address():
    with pytest.raises(ServiceProblem, match="HTTP 404 Not Found: <h1>nginx</h1>"):
        make(Script([httpx.Response(404, text="<h1>nginx</h1>")])).identity()
    with pytest.raises(ServiceProblem, match="is MOEDISCO_URL that of a MoeDisco service"):
        make(Script([httpx.Response(200, text="<h1>hello</h1>")])).identity()
    with pytest.raises(ServiceProblem, match="HTTP 302 Found"):
        make(Script([httpx.Response(302)])).identity()


def test_what_a_newer_service_adds_is_passed_over():
    money = RUN["money"] | {"carbon": 3}
    assert make(Script([RUN | {"novelty": 1, "money": money}])).run("x").money.dollars == 0.5


def test_pages_are_asked_for_until_the_last():
    run = {key: value for key, value in RUN.items() if key != "config"}
    service = Script(
        [
            {"items": [run, run | {"name": "b"}], "next_cursor": "c1"},
            problem(503),
            {"items": [run | {"name": "c"}], "next_cursor": None},
        ]
    )
    client = make(service)
    found = client.runs(states=[RunState.RUNNING, RunState.QUEUED], tags={"team": "a:b"}, page_size=2)
    assert [run.name for run in found] == ["demo", "b", "c"]
    assert service.requests[0].url.query == b"state=running&state=queued&tag=team%3Aa%3Ab&limit=2"
    assert service.requests[2].url.params["cursor"] == "c1"


def test_names_are_quoted():
    service = Script([httpx.Response(200, text="x")])
    make(service).log("a/b?", "../driver", tail=3)
    assert service.requests[0].url.raw_path == b"/v1/runs/a%2Fb%3F/logs/..%2Fdriver?tail=3&follow=false"


def test_a_service_that_asks_for_a_wait_is_given_it(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("stamina._core._smart_sleep", sleep)
    busy = problem(429, headers={"Retry-After": "7"})
    make(Script([busy, busy, problem(503), problem(503), RUN]), RetryPolicy(first_wait=0.5, longest_wait=10)).run("x")
    assert waits[:2] == [7, 7]
    assert 2 <= waits[2] <= 4  # 0.5 s, doubled twice, plus a random part of at most 2 s
    assert 4 <= waits[3] <= 6


def test_retry_after_is_read_as_seconds_and_as_a_date():
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, now=lambda: 40.0) == 60
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_the_address_file_is_the_owners_alone(tmp_path):
    path = save_address(Address(URL, "mdk_secret"), tmp_path / "a" / "service.json")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_address(path) == Address(URL, "mdk_secret")
    assert "mdk_secret" not in repr(load_address(path))
    save_address(Address(URL, "new"), path)
    assert load_address(path).token == "new"
    assert list(path.parent.iterdir()) == [path]


def test_where_the_address_comes_from(tmp_path):
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert address_file(environment) == tmp_path / "moedisco" / "service.json"
    with pytest.raises(UserError, match="moedisco serve"):
        find_address(environment=environment)
    save_address(Address(URL, "saved"), address_file(environment))
    assert find_address(environment=environment) == Address(URL, "saved")
    assert find_address(environment=environment | {"MOEDISCO_TOKEN": "mine"}) == Address(URL, "mine")
    assert find_address(URL + "/", environment=environment) == Address(URL, "saved")
    assert find_address("http://a", "t", environment | {"MOEDISCO_URL": "http://b"}) == Address("http://a", "t")


def test_a_saved_token_is_not_sent_elsewhere(tmp_path):
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "MOEDISCO_URL": "http://elsewhere"}
    save_address(Address(URL, "saved"), address_file(environment))
    assert find_address(environment=environment).token is None


@pytest.mark.parametrize("content", ["", "[]", "{", '{"url": 3}', '{"url": "http://a", "token": 3}'])
def test_an_address_file_that_holds_something_else(tmp_path, content):
    path = tmp_path / "service.json"
    path.write_text(content)
    with pytest.raises(UserError, match="start `moedisco serve` again"):
        load_address(path)


@pytest.mark.parametrize("url", ["service.test", "ftp://service.test", "http://", "http://a b:c"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is not a URL of a service"):
        Client(url)


def test_every_error_is_in_the_tree():
    for error in (ServiceAway, ServiceProblem, RequestRefused):
        assert issubclass(error, MoeDiscoError)
    assert PROMPT.longest_wait == 0
