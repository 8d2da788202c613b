import yaml
from api_client import demo

from moedisco_ray.core.config import check_config
from moedisco_ray.plan import build_plan
from moedisco_ray.plan.machine import known_machine
from service.errors import DatabaseUnavailable


def test_an_estimate_is_the_plan(api):
    answer = api.reader.post("/v1/estimates", json={"config": demo()})
    said = answer.json()
    notes = said.pop("notes")
    config = check_config(demo())
    assert said == build_plan(config, known_machine(config, here=True)).model_dump(mode="json")
    assert notes == ["No operator price for high_mem_gpu, low_mem_gpu: the price in the configuration is used"]


def test_presets_and_schema_are_what_the_command_line_has(api):
    preset = api.ann.get("/v1/presets/demo")
    assert preset.headers["content-type"].startswith("text/yaml")
    assert check_config(yaml.safe_load(preset.text)).name == "demo"
    assert api.ann.get("/v1/presets/none").status_code == 422
    assert "corpus" in api.ann.get("/v1/schema").json()["properties"]


def test_every_preset_can_be_submitted_as_it_is(api):
    for name in ("demo", "default"):
        config = yaml.safe_load(api.ann.get(f"/v1/presets/{name}").text)
        config["corpus"]["sources"] = [{"path": "embedded"}]
        assert api.ann.post("/v1/runs", json={"config": config}).status_code == 201


def test_the_operators_prices_show_at_the_pools(api):
    api.admin.put("/v1/policies", json={"default": {"prices": {"low_mem_gpu": 1.5}}})
    pools = {pool["resource"]: pool["price_per_hour"] for pool in api.ann.get("/v1/pools").json()["items"]}
    assert (pools["low_mem_gpu"], pools["high_mem_gpu"]) == (1.5, None)


def test_pools_that_waiting_runs_ask_for_are_listed(api):
    api.submit(pools={"low_memory": {"resource": "t4"}})
    assert "t4" in {pool["resource"] for pool in api.ann.get("/v1/pools").json()["items"]}
    api.pools.away = True
    assert api.ann.get("/v1/pools").json() == {"connected": False, "items": []}


def test_a_token_is_shown_once(api):
    request = {"name": "ci", "owner": "ci@example.org", "scopes": ["submit", "read", "read"], "expires_in_days": None}
    made = api.admin.post("/v1/tokens", json=request)
    assert made.status_code == 201
    assert made.json()["token"].startswith("mdk_")
    assert (made.json()["scopes"], made.json()["expires"]) == (["read", "submit"], None)
    listed = api.admin.get("/v1/tokens")
    assert made.json()["id"] in {token["id"] for token in listed.json()["items"]}
    assert made.json()["token"] not in listed.text
    assert made.json()["token"] not in api.admin.get("/v1/audit").text
    assert api.admin.delete("/v1/tokens/none").status_code == 404


def test_every_change_of_access_is_in_the_audit_log(api):
    token = api.admin.post("/v1/tokens", json={"name": "x", "owner": "x", "scopes": ["read"]}).json()["id"]
    api.admin.delete(f"/v1/tokens/{token}")
    api.admin.put("/v1/policies/owners/x", json={"highest_priority": 5})
    first = api.admin.get("/v1/audit", params={"limit": 2}).json()
    rest = api.admin.get("/v1/audit", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert [entry["action"] for entry in first["items"] + rest["items"]] == [
        "policy.set",
        "token.revoke",
        "token.create",
    ]
    assert rest["next_cursor"] is None


def test_health_and_readiness_are_two_things(api, monkeypatch):
    assert api.anonymous.get("/healthz").json() == {"status": "ok", "checks": {}}
    assert api.anonymous.get("/readyz").json()["status"] == "ok"
    api.pools.away = True
    away = api.anonymous.get("/readyz")
    assert (away.status_code, away.json()["checks"]["ray"]) == (503, "does not answer")
    api.pools.away = False

    def gone(self):
        raise DatabaseUnavailable("the database does not answer")

    monkeypatch.setattr(type(api.database), "check", gone)
    assert api.anonymous.get("/readyz").status_code == 503
    assert api.anonymous.get("/healthz").status_code == 200


def test_prometheus_sees_requests_by_route_and_runs_by_state(api):
    api.submit()
    api.ann.get("/v1/runs/none")
    api.anonymous.request("STRANGE", "/x/y")
    text = api.anonymous.get("/metrics").text
    assert 'moedisco_runs{state="queued"} 1.0' in text
    assert 'moedisco_http_requests_total{method="GET",route="/v1/runs/{run_id}",status="404"} 1.0' in text
    assert 'method="other",route="other"' in text


def test_curves_are_chosen_and_thinned(api):
    run = api.submit()["id"]
    answer = api.ann.get(f"/v1/runs/{run}/metrics", params={"unit": ["a", "b"], "points": 2, "figure": "lr"})
    assert answer.json() == {"figure": "lr", "series": []}
    assert api.ann.get(f"/v1/runs/{run}/metrics", params={"figure": "speed"}).status_code == 422


def test_the_page_and_its_parts_are_served(api):
    page = api.anonymous.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert api.anonymous.get("/static/app.js").headers["content-type"].startswith("text/javascript")


def test_the_document_names_operations_examples_and_ways_on(api):
    document = api.anonymous.get("/openapi.json").json()
    operations = {
        operation["operationId"]: operation for path in document["paths"].values() for operation in path.values()
    }
    assert operations["submit_run"]["responses"]["201"]["links"]["get_run"]["operationId"] == "get_run"
    assert operations["get_run"]["security"] == [{"token": []}, {"session": []}]
    assert operations["report_events"]["security"] == [{"driver": []}]
    for operation in operations.values():
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and operation["operationId"] != "readyz":
                assert list(answer["content"]) == ["application/problem+json"]
    assert document["components"]["schemas"]["RunRequest"]["examples"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
