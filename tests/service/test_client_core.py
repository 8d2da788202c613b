import inspect
import json
import pickle
import stat

import httpx
import pytest
from client_standin import PROMPT, RUN, URL, Script, make, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import MoeDiscoError, UserError
from service.client import (
    Address,
    AsyncClient,
    Client,
    Patience,
    RequestRefused,
    ServiceAway,
    ServiceProblem,
    address_file,
    find_address,
    load_address,
    save_address,
)
from service.client.patience import Attempts, retry_after
from service.domain.states import RunState

AWAY = httpx.ConnectError("connection refused")
CONFIG = {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}}


@pytest.fixture(params=["sync", "async"])
def kind(request):
    return request.param


def test_both_clients_have_the_same_methods():
    def signatures(client):
        return {
            name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
            for name, method in vars(client).items() if not name.startswith("_")}
    assert signatures(Client) == signatures(AsyncClient)


def test_a_run_is_submitted_with_what_was_set_and_a_key(kind):
    service = Script([RUN])
    run = make(kind, service).submit(check_config(CONFIG), priority=3, budget_dollars=2.5)
    assert (run.id, run.state) == (RUN["id"], RunState.RUNNING)
    request, = service.requests
    assert json.loads(request.content) == {"config": CONFIG, "priority": 3, "budget_dollars": 2.5}
    assert request.headers["authorization"] == "Bearer mdk_test"
    assert len(request.headers["idempotency-key"]) == 32


def test_a_submission_is_repeated_with_the_same_key(kind):
    service = Script([AWAY, problem(503), httpx.ReadError("cut"), RUN])
    client = make(kind, service)
    assert client.submit(CONFIG).id == RUN["id"]
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 1
    assert len(service.requests) == 4
    client.submit(CONFIG)
    assert service.requests[-1].headers["idempotency-key"] != service.requests[0].headers["idempotency-key"]


def test_a_retry_is_repeated_with_its_key(kind):
    service = Script([AWAY, RUN])
    make(kind, service).retry("x", {"seed": 1}, budget_dollars=2)
    assert len({request.headers["idempotency-key"] for request in service.requests}) == 1
    assert json.loads(service.requests[1].content) == {"changes": {"seed": 1}, "budget_dollars": 2}


@pytest.mark.parametrize("failure", [AWAY, problem(429), problem(502), problem(503), problem(504)])
def test_reading_is_repeated(kind, failure):
    service = Script([failure, failure, RUN])
    assert make(kind, service).run("x").name == "demo"
    assert len(service.requests) == 3


@pytest.mark.parametrize("failure", [AWAY, problem(503), problem(429)])
@pytest.mark.parametrize("call", [
    lambda client: client.cancel("x"), lambda client: client.resume("x"), lambda client: client.delete("x"),
    lambda client: client.create_token("n", "o", ["read"]),
    lambda client: client.change("x", priority=1), lambda client: client.delete_policy("ann"),
])
def test_what_is_not_safe_is_sent_once(kind, failure, call):
    service = Script([failure])
    with pytest.raises((ServiceAway, ServiceProblem)):
        call(make(kind, service))
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500])
def test_what_will_not_pass_is_not_repeated(kind, status):
    service = Script([problem(status, "no")])
    with pytest.raises(ServiceProblem, match="no") as caught:
        make(kind, service).run("x")
    assert caught.value.status == status
    assert isinstance(caught.value, UserError) == (status < 500)
    assert len(service.requests) == 1


def test_patience_ends_with_the_address_and_the_remedy(kind):
    service = Script([AWAY])
    with pytest.raises(ServiceAway) as caught:
        make(kind, service, Patience(seconds=0.05, first=0.01)).pools()
    assert len(service.requests) > 1
    assert str(caught.value) == (
        f"no service answers at {URL} (connection refused); start one with `moedisco serve`, or set MOEDISCO_URL to where it runs")


def test_a_wait_longer_than_patience_is_not_waited_for(kind):
    service = Script([problem(429, "too many", headers={"Retry-After": "3600"})])
    with pytest.raises(ServiceProblem, match="too many"):
        make(kind, service).run("x")
    assert len(service.requests) == 1


def test_mistakes_are_told_as_the_command_line_tells_them(kind):
    service = Script([problem(422, "2 mistakes", [("config.tokens.total", "must be above 0"), ("priority", "is\nlow")])])
    with pytest.raises(RequestRefused) as caught:
        make(kind, service).submit(CONFIG)
    assert str(caught.value) == "tokens.total: must be above 0; priority: is low"
    assert (caught.value.field, caught.value.remedy) == ("config.tokens.total", "must be above 0")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_refused_token_names_the_remedy(kind):
    with pytest.raises(RequestRefused, match="token expired; set MOEDISCO_TOKEN to a valid token"):
        make(kind, Script([problem(401, "token expired")])).identity()


def test_another_program_at_the_address(kind):
    with pytest.raises(ServiceProblem, match="HTTP 404 Not Found: <h1>nginx</h1>"):
        make(kind, Script([httpx.Response(404, text="<h1>nginx</h1>")])).identity()
    with pytest.raises(ServiceProblem, match="is MOEDISCO_URL that of a MoeDisco service"):
        make(kind, Script([httpx.Response(200, text="<h1>hello</h1>")])).identity()
    with pytest.raises(ServiceProblem, match="HTTP 302 Found"):
        make(kind, Script([httpx.Response(302)])).identity()


def test_what_a_newer_service_adds_is_passed_over(kind):
    money = RUN["money"] | {"carbon": 3}
    assert make(kind, Script([RUN | {"novelty": 1, "money": money}])).run("x").money.dollars == 0.5


def test_pages_are_asked_for_until_the_last(kind):
    run = {key: value for key, value in RUN.items() if key != "config"}
    service = Script([
        {"items": [run, run | {"name": "b"}], "next_cursor": "c1"}, problem(503),
        {"items": [run | {"name": "c"}], "next_cursor": None}])
    client = make(kind, service)
    found = client.runs(states=[RunState.RUNNING, RunState.QUEUED], tags={"team": "a:b"}, page_size=2)
    assert [run.name for run in found] == ["demo", "b", "c"]
    assert service.requests[0].url.query == b"state=running&state=queued&tag=team%3Aa%3Ab&limit=2"
    assert service.requests[2].url.params["cursor"] == "c1"


def test_names_are_quoted(kind):
    service = Script([httpx.Response(200, text="x")])
    make(kind, service).log("a/b?", "../driver", tail=3)
    assert service.requests[0].url.raw_path == b"/v1/runs/a%2Fb%3F/logs/..%2Fdriver?tail=3&follow=false"


@settings(deadline=None)
@given(st.integers(0, 40), st.floats(0, 1))
def test_pauses_grow_to_the_longest_and_patience_ends(failures, jitter):
    now = 0.0
    attempts = Attempts(Patience(seconds=100, first=0.25, longest=10), clock=lambda: now, jitter=lambda: jitter)
    for number in range(failures):
        pause = attempts.pause()
        if pause is None:
            assert now >= 100
            return
        assert pause <= min(10, 0.25 * 2**number)
        assert pause >= min(min(10, 0.25 * 2**number) / 2, 100 - now)
        now += pause
    attempts.went_well()
    now += 1000
    assert attempts.pause() is not None


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
    with pytest.raises(UserError, match="is no address of a service"):
        Client(url)


def test_every_error_is_in_the_tree():
    for error in (ServiceAway, ServiceProblem, RequestRefused):
        assert issubclass(error, MoeDiscoError)
    assert PROMPT.longest == 0
