"""A tenant cannot set prices, overtake others, take Ray's own resources, flood the queue, or read others' quotas."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from api_client import Service, demo, service
from databases import database_url, migrated_postgresql
from starlette.testclient import TestClient

from moedisco_ray.core.records.events import Event
from service.database import quotas, sharers

PRICED = {"prices": {"low_mem_gpu": 0.5, "high_mem_gpu": 3.0}}
FREE = {"low_memory": {"price_per_hour": 0}, "high_memory": {"price_per_hour": 0}}
T0 = 1_800_000_000.0

__all__ = ["database_url", "migrated_postgresql"]


def set_policies(api: Service, **default: object) -> None:
    assert api.admin.put("/v1/policies", json={"default": default}).status_code == 200


def refused(answer, field: str) -> str:
    assert answer.status_code == 403, answer.text
    assert answer.json()["type"] == "urn:moedisco:problem:policy"
    [mistake] = answer.json()["errors"]
    assert mistake["field"] == field
    return mistake["message"]


def test_a_tenants_price_of_zero_is_replaced_by_the_operators(api: Service, tenant: TestClient):
    set_policies(api, **PRICED)
    honest = tenant.post("/v1/estimates", json={"config": demo()}).json()
    free = tenant.post("/v1/estimates", json={"config": demo(pools=FREE)}).json()
    assert free["training_dollars"] == honest["training_dollars"] > 0
    assert free["bill"] == honest["bill"]
    assert len(free["notes"]) == 2
    assert "replaces 0" in free["notes"][0]
    run = api.submit(pools=FREE)
    assert (run["config"]["pools"]["low_memory"]["price_per_hour"], run["notes"]) == (0.5, free["notes"])
    assert run["estimate"] == honest["bill"]


def test_a_tenants_price_of_zero_does_not_empty_a_budget(api: Service, tenant: TestClient):
    set_policies(api, **PRICED)
    run = api.submit(pools=FREE)["id"]
    api.start(run)
    held = Event("workers_held", "submodels", data={"hold": "a", "pool": "low_memory", "workers": 2}, time=T0)
    api.report(run, held, Event("heartbeat", time=T0 + 3600))
    assert tenant.get(f"/v1/runs/{run}").json()["money"]["dollars"] == pytest.approx(1.0)
    assert tenant.get("/v1/quota").json()["dollars"]["used"] == pytest.approx(1.0)


def test_a_retry_cannot_bring_the_tenants_price_back(api: Service, tenant: TestClient):
    set_policies(api, **PRICED)
    run = api.submit()["id"]
    again = tenant.post(f"/v1/runs/{run}/retry", json={"changes": {"pools.low_memory.price_per_hour": 0}}).json()
    assert again["config"]["pools"]["low_memory"]["price_per_hour"] == 0.5


def test_deleting_runs_does_not_give_dollars_back(api: Service, tenant: TestClient):
    set_policies(api, **PRICED, dollars_per_month=1)
    run = api.submit()["id"]
    with api.database.write() as session:
        quotas.add_dollars(session, "ann", "", 1.0, time.time())
    assert tenant.delete(f"/v1/runs/{run}").status_code == 204
    message = refused(tenant.post("/v1/runs", json={"config": demo()}), "dollars_per_month")
    assert message == "1.0: your $1.00 for this month are used up; submit again next month, or ask the operator"


def test_dollars_cannot_be_dodged_by_a_resource_without_a_price(api: Service, tenant: TestClient):
    set_policies(api, **PRICED, dollars_per_month=1)
    pools = {"low_memory": {"resource": "my_gpu", "price_per_hour": 0}}
    message = refused(tenant.post("/v1/runs", json={"config": demo(pools=pools)}), "config.pools.low_memory.resource")
    assert "'my_gpu': has no operator price" in message


def test_no_tenant_overtakes_others(api: Service):
    api.admin.put("/v1/policies", json={})
    bob = api.bob
    for priority in (100, 1):
        message = refused(bob.post("/v1/runs", json={"config": demo(), "priority": priority}), "priority")
        assert message == f"{priority}: is above your highest priority of 0; lower it"
    run = api.submit("bob")["id"]
    refused(bob.patch(f"/v1/runs/{run}", json={"priority": 100}), "priority")
    refused(bob.post(f"/v1/runs/{run}/retry", json={"priority": 100}), "priority")
    assert bob.patch(f"/v1/runs/{run}", json={"priority": -5}).json()["priority"] == -5
    # What an administrator gave is not taken over by a retry.
    assert api.admin.patch(f"/v1/runs/{run}", json={"priority": 100}).status_code == 200
    assert bob.post(f"/v1/runs/{run}/retry", json={}).json()["priority"] == 0


@pytest.mark.parametrize(
    "resource",
    [
        "CPU",
        "GPU",
        "memory",
        "object_store_memory",
        "node:10.0.0.1",
        "node:__internal_head__",
        "accelerator_type:A100",
        "TPU",
        "bundle_group_0123456789abcdef0123",
        "CPU_group_0_0123456789abcdef0123",
        "low_mem_gpu_group_0123456789abcdef0123",
        "x" * 65,
        "a b",
        "",
        "ä",
    ],
)
def test_rays_own_resources_are_no_pools(api: Service, tenant: TestClient, resource: str):
    types = [{"name": "t", "resource": resource, "memory_gb": 24, "price_per_hour": 1, "speed": 1}]
    for pools in (
        {"low_memory": {"resource": resource}},
        {"high_memory": {"resource": resource}},
        {"low_memory": {"types": types}},
    ):
        answer = tenant.post("/v1/runs", json={"config": demo(pools=pools)})
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["field"].endswith("resource")


def test_only_allowed_resources_are_taken(api: Service, tenant: TestClient):
    set_policies(api, resources=["low_mem_gpu"])
    message = refused(tenant.post("/v1/runs", json={"config": demo()}), "config.pools.high_memory.resource")
    assert message == "'high_mem_gpu': is not among the resources that you may use: low_mem_gpu"
    refused(tenant.post("/v1/estimates", json={"config": demo()}), "config.pools.high_memory.resource")
    assert api.submit(finetune={"pool": "low_memory"})["state"] == "queued"
    types = [
        {"name": name, "resource": f"{name}_gpu", "memory_gb": 24, "price_per_hour": 1, "speed": 1}
        for name in ("t4", "l4")
    ]
    config = demo(finetune={"pool": "high_memory"}, pools={"low_memory": {"types": types}})
    refused(tenant.post("/v1/runs", json={"config": config}), "config.pools.low_memory.types.0.resource")


def test_the_queue_cannot_be_flooded(api: Service, tenant: TestClient):
    set_policies(api, queued_runs=3)
    made = [api.submit()["id"] for _ in range(3)]
    message = refused(tenant.post("/v1/runs", json={"config": demo()}), "queued_runs")
    assert message == "3: you may have 3 queued runs; wait until one starts, or cancel one"
    refused(tenant.post(f"/v1/runs/{made[0]}/retry", json={}), "queued_runs")
    assert tenant.post(f"/v1/runs/{made[0]}/cancel").status_code == 202
    api.submit()
    refused(tenant.post(f"/v1/runs/{made[0]}/resume"), "queued_runs")
    assert api.submit("bob")["state"] == "queued", "another owner's queue is another's"


def test_the_queue_cannot_be_flooded_by_requests_at_the_same_moment(database_url: str, tmp_path: Path):
    with service(tmp_path, database_url=database_url) as api:
        set_policies(api, queued_runs=3)
        with ThreadPoolExecutor(8) as threads:
            answers = list(
                threads.map(lambda _: api.ann.post("/v1/runs", json={"config": demo()}).status_code, range(8))
            )
        assert sorted(answers) == [201] * 3 + [403] * 5


def test_the_queue_is_limited_without_any_policy(api: Service, tenant: TestClient):
    api.admin.put("/v1/policies", json={})
    assert tenant.get("/v1/quota").json()["queued_runs"] == {"used": 0, "limit": 100}


def test_a_full_disk_refuses_new_runs_and_cannot_be_emptied_by_leaving_files(api: Service, tenant: TestClient):
    set_policies(api, disk_bytes=10**9)
    run = api.submit()["id"]
    with api.database.write() as session:
        sharers.measured(session, run, 10**9, {}, T0)
    assert "fill the 1.0 GB of disk" in refused(tenant.post("/v1/runs", json={"config": demo()}), "disk_bytes")
    refused(tenant.delete(f"/v1/runs/{run}", params={"keep_artifacts": True}), "keep_artifacts")
    assert tenant.delete(f"/v1/runs/{run}").status_code == 204
    assert api.submit()["state"] == "queued"


@pytest.mark.slow
def test_thirty_runs_with_the_largest_tags_are_a_small_list(api: Service, tenant: TestClient):
    tags = {f"{i:02}".ljust(63, "k"): "\N{GRINNING FACE}" * 63 for i in range(16)}
    types = [
        {"name": f"t{i}", "resource": f"r{i}", "memory_gb": 24, "price_per_hour": 1, "speed": 1} for i in range(32)
    ]
    for _ in range(30):
        api.submit(tags=tags, name="n" * 63, pools={"low_memory": {"types": types}})
    assert len(tenant.get("/v1/runs").content) < 300_000


@pytest.mark.parametrize(
    "config",
    [
        {"tags": {str(i): "x" for i in range(17)}},
        {"tags": {"k" * 64: "x"}},
        {"tags": {"k": "x" * 64}},
        {"tags": {"k": "\x01"}},
        {"name": "n" * 64},
        {"evaluation": {"prompts": ["x"] * 65}},
        {"evaluation": {"prompts": ["x" * 2001]}},
        {"pools": {"high_memory": {"workers": [10**6, 10**12]}}},
        {"tracking": {"trackers": {"wandb": "x" * 257}}},
        {
            "pools": {
                "low_memory": {
                    "types": [
                        {"name": f"t{i}", "resource": f"r{i}", "memory_gb": 24, "price_per_hour": 1, "speed": 1}
                        for i in range(33)
                    ]
                }
            }
        },
    ],
)
def test_no_setting_is_larger_than_needed(api: Service, tenant: TestClient, config: dict):
    assert tenant.post("/v1/runs", json={"config": demo(**config)}).status_code == 422


def test_tags_of_a_change_are_as_small(api: Service, tenant: TestClient):
    run = api.submit()["id"]
    assert tenant.patch(f"/v1/runs/{run}", json={"tags": {"k": "x" * 64}}).status_code == 422


@pytest.mark.parametrize("number", ["NaN", "-Infinity", '"inf"', "-1", "-0.0"])
def test_a_budget_is_a_positive_number(api: Service, tenant: TestClient, number: str):
    for method, path in (("POST", "/v1/runs"), ("PATCH", f"/v1/runs/{api.submit()['id']}")):
        config = f'"config": {json.dumps(demo())}, ' if method == "POST" else ""
        body = f'{{{config}"budget_dollars": {number}}}'
        answer = tenant.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize("number", ['"inf"', '"nan"', "-1", "1e999"])
def test_a_price_is_a_finite_number(api: Service, tenant: TestClient, number: str):
    body = json.dumps({"config": demo(pools={"low_memory": {"price_per_hour": "HERE"}})}).replace('"HERE"', number)
    answer = tenant.post("/v1/estimates", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


def test_policies_are_the_operators(api: Service, tenant: TestClient):
    before = api.admin.get("/v1/policies").json()
    own = "/v1/policies/owners/ann"
    for method, path in (("GET", "/v1/policies"), ("PUT", "/v1/policies"), ("PUT", own), ("DELETE", own)):
        assert tenant.request(method, path, json={} if method == "PUT" else None).status_code == 403
        assert api.anonymous.request(method, path, json={} if method == "PUT" else None).status_code == 401
    assert api.admin.get("/v1/policies").json() == before


def test_another_owners_quota_is_not_shown(api: Service, tenant: TestClient):
    assert tenant.get("/v1/quota", params={"owner": "bob"}).status_code == 403
    assert api.reader.get("/v1/quota").json()["owner"] == "ann"
    assert api.admin.get("/v1/quota", params={"owner": "bob"}).json()["owner"] == "bob"


def test_policies_of_a_file_cannot_be_changed_over_rest(tmp_path):
    file = tmp_path / "policies.yaml"
    file.write_text("default: {queued_runs: 5}")
    with service(tmp_path, policies=file) as made:
        for path in ("/v1/policies", "/v1/policies/owners/ann"):
            answer = made.admin.put(path, json={})
            assert (answer.status_code, str(file) in answer.json()["detail"]) == (409, True)
        assert made.admin.delete("/v1/policies/owners/ann").status_code == 409
