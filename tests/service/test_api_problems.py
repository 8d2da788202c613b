import json

import pytest
from api_client import demo, service
from drawn import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError, UserError
from service.errors import DatabaseUnavailable


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    with service(tmp_path_factory.mktemp("problems"), requests_per_minute=1_000_000) as made:
        yield made


def post(api, body, path="/v1/runs", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return api.ann.post(path, content=content, headers={"Content-Type": "application/json", **headers})


def mistake(answer):
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()["errors"][0]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/", 404),
        ("PUT", "/v1/runs", 405),
        ("TRACE", "/v1/runs", 405),
        ("GET", "/static/none.js", 404),
        ("GET", "/static/../app.py", 404),
        ("GET", "/%00", 404),
        ("POST", "/healthz", 405),
        ("GET", "/v1/runs/", 404),
    ],
)
def test_the_routers_own_errors_are_problems(api, method, path, status):
    answer = api.ann.request(method, path)
    problem = answer.json()
    assert (answer.status_code, problem["status"], answer.headers["content-type"]) == (
        status,
        status,
        "application/problem+json",
    )
    assert problem["type"].startswith("urn:moedisco:problem:")
    assert problem["instance"].startswith("/")
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nope",
        b"\xff\xfe",
        b'{"config": NaN}',
        b'{"config": "\\ud800"}',
        b"[" * 5000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b"\x00",
    ],
)
def test_what_is_no_json_is_refused(api, body):
    assert post(api, body).status_code == (422 if body == b"" else 400)


def test_another_media_type_is_not_taken_for_json(api):
    answer = api.ann.post("/v1/runs", content=json.dumps({"config": demo()}), headers={"Content-Type": "text/plain"})
    assert "Content-Type" in mistake(answer)["message"]


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"name": "a\0"}, "config.name"),
        ({"seed": 2**60}, "config.seed"),
        ({"tags": {"a": "\0"}}, "config.tags.a"),
        ({"tags": {"\0": "a"}}, "config.tags"),
        ({"tokens": {"total": 1e999}}, "config.tokens.total"),
    ],
)
def test_values_that_not_every_part_can_hold_are_refused_by_field(api, config, field):
    body = json.dumps({"config": demo(**config)}).replace("Infinity", "1e999").encode()
    assert mistake(post(api, body))["field"] == field


WRONG = [
    {"seed": -1},
    {"seed": "x"},
    {"clusters": {"count": 3}},
    {"clustrs": {}},
    {"corpus": {}},
    {"corpus": None},
    {"corpus": {"sources": []}},
    {"corpus": {"sources": [{"path": "embedded", "weight": 1000}]}},
    {"name": "a/b"},
    {"name": None},
    {"output": "http://x"},
    {"model": {"init": {"checkpoint": 3}}},
    {"checkpoint": {"every": "never"}},
    {"tokens": {"seed_share": 0.9}},
    {"finetune": {"optimizer": {"batch_tokens": 1000}}},
    {"model": {"config": {"num_attention_heads": 3}}},
    {"model": {"family": "gpt"}},
    {"pools": {"low_memory": {"resource": "a b"}}},
    {"tracking": {"trackers": {"wandb": 3}}},
    {"tags": {"a": 1}},
]


@pytest.mark.parametrize("config", WRONG, ids=json.dumps)
def test_a_mistake_has_the_message_of_validate(api, config):
    with pytest.raises(ConfigError) as caught:
        check_config(demo(**config))
    found = mistake(post(api, {"config": demo(**config)}))
    assert f"{found['field'].removeprefix('config.')}: {found['message']}" == str(caught.value)


def test_absent_files_have_the_message_of_validate(api):
    found = mistake(post(api, {"config": demo(corpus={"sources": [{"path": "absent.txt"}]})}))
    assert found["field"] == "config.corpus.sources.0.path"
    assert found["message"].endswith("no such file or folder")


def test_paths_elsewhere_tell_nothing_of_what_is_there(api):
    messages = {
        mistake(post(api, {"config": demo(corpus={"sources": [{"path": path}]})}))["message"].replace(path, "")
        for path in ("/etc/passwd", "/etc/absent")
    }
    assert len(messages) == 1


def test_fields_outside_of_the_configuration_are_named_too(api):
    answer = post(api, {"config": demo(), "priority": 1000, "budget": 1})
    assert {error["field"] for error in answer.json()["errors"]} == {"priority", "budget"}
    assert mistake(api.ann.get("/v1/runs", params={"limit": 0}))["field"] == "limit"
    assert mistake(post(api, {"config": demo()}, **{"Idempotency-Key": "a b"}))["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 10**12, "num_experts_per_tok": 2},
        {"num_experts": "1000000000000"},
        {"num_experts": 1e300},
        {"hidden_size": 2**52},
        {"num_hidden_layers": 2**53, "moe_intermediate_size": 2**53, "hidden_size": 2**50},
    ],
)
def test_sizes_without_measure_are_answered_soon(api, sizes):
    answer = post(api, {"config": demo(model={"config": sizes}, tokens={"total": 2**53})}, "/v1/estimates")
    assert answer.status_code in (200, 422)


def test_a_batch_without_measure_is_refused(api):
    found = mistake(
        post(api, {"config": demo(tokens={"total": 2**53 - 1}, finetune={"optimizer": {"batch_tokens": 2**50}})})
    )
    assert found["field"] == "config.finetune.optimizer.batch_tokens"


def test_a_body_above_the_limit_is_not_read(api):
    read = []

    def endless():
        while len(read) < 1000:
            read.append(1)
            yield b"x" * 2**16

    answer = api.ann.post("/v1/runs", content=endless(), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")
    announced = api.ann.post("/v1/runs", content=b"{}", headers={"Content-Length": "999999999"})
    assert announced.status_code == 413


def test_a_database_that_is_away_is_a_reason_to_come_back(api, monkeypatch):
    def away(self):
        raise DatabaseUnavailable("the database does not answer")

    monkeypatch.setattr(type(api.database), "read", away)
    answer = api.ann.get("/v1/runs")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")


def test_an_unforeseen_error_reveals_nothing(api, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("secret detail")

    monkeypatch.setattr(type(api.pools), "read", broken)
    answer = api.client("ann", raise_server_exceptions=False).get("/v1/pools")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from(
    ["name", "seed", "tags", "corpus", "tokenizer", "model", "tokens", "clusters", "pools", "output", "finetune"]
)


@settings(max_examples=examples(30, 150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(SECTIONS, JSON, max_size=3))
def test_no_configuration_breaks_the_service(api, sections):
    answer = post(api, {"config": demo(**sections)}, "/v1/estimates")
    assert answer.status_code in (200, 400, 422)
    if answer.status_code == 422:
        assert answer.json()["errors"]


def test_a_user_error_of_any_kind_is_422(api):
    assert issubclass(ConfigError, UserError)
    tokenizer = {"tokenizer": {"path": "."}}
    assert mistake(post(api, {"config": demo(**tokenizer)}, "/v1/estimates"))["field"] == "config.tokenizer.path"
