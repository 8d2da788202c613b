"""A finished run is the start of another only for those who may see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from api_client import Service, demo
from corpus_sources import documents_of
from fake_jobs import FakeJobs

from moedisco_ray.core.config import Source, check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.read_roots import reading_within
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits
from service.background.reconciler import Reconciler
from service.database import runs
from service.domain.states import RunState

FINISHED = (RunState.STARTING, RunState.RUNNING, RunState.SUCCEEDED)
MODEL = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 16,
    "vocab_size": 300,
    "norm_topk_prob": True,
}


def finished(api: Service, who: str = "ann", name: str = "first") -> str:
    """A run that has succeeded, with what a start reads of its directory."""
    run_id = api.submit(who, name=name)["id"]
    directory = api.directory(run_id)
    api.bring(run_id, *FINISHED)
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(json.dumps(MODEL))
    (directory / "model" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 299}}}))
    for part, text in (("train", "trained on"), ("validation", "held out")):
        (directory / "corpus" / part).mkdir(parents=True)
        pq.write_table(pa.table({"text": [text], "id": ["x"]}), directory / "corpus" / part / "part-00000.parquet")
    (directory / "corpus" / "tokenizer").mkdir()
    (directory / "corpus" / "tokenizer" / "tokenizer.json").write_text("{}")
    return run_id


def start(run: str, **changes: Any) -> dict[str, Any]:
    return (
        demo(
            name="second",
            model={"init": {"checkpoint": f"run://{run}/model"}},
            tokens={"seed_share": 0},
            tokenizer={"path": f"run://{run}/model"},
            corpus={"sources": [{"path": f"run://{run}/corpus"}]},
        )
        | changes
    )


@pytest.mark.parametrize("named", [pytest.param("id", marks=pytest.mark.slow), "name"])
def test_the_owner_and_an_admin_start_from_a_finished_run(api: Service, named: str) -> None:
    run_id = finished(api)
    for who in ("ann", "admin"):
        asked = {"config": start(run_id if named == "id" else "first")}
        assert api.client(who).post("/v1/estimates", json=asked).status_code == 200
        answer = api.client(who).post("/v1/runs", json=asked)
        assert answer.status_code == 201, answer.text
        config = answer.json()["config"]
        assert config["model"]["init"]["checkpoint"] == config["tokenizer"]["path"] == f"run://{run_id}/model"
        assert config["corpus"]["sources"][0]["path"] == f"run://{run_id}/corpus"
        again = api.client(who).post(f"/v1/runs/{answer.json()['id']}/retry", json={})
        assert again.status_code == 201, again.text


@pytest.mark.parametrize("field", ["model.init.checkpoint", "tokenizer.path", "corpus.sources.0.path"])
def test_another_tenants_run_is_not_found(api: Service, field: str) -> None:
    run_id = finished(api)
    only = {
        "model.init.checkpoint": {"model": start(run_id)["model"], "tokens": {"seed_share": 0}},
        "tokenizer.path": {"tokenizer": start(run_id)["tokenizer"]},
        "corpus.sources.0.path": {"corpus": start(run_id)["corpus"]},
    }[field]
    for endpoint in ("/v1/runs", "/v1/estimates"):
        theirs = api.bob.post(endpoint, json={"config": demo(**only)})
        assert theirs.status_code == 422
        assert theirs.json()["errors"][0]["field"] == f"config.{field}"
        absent = api.bob.post(endpoint, json={"config": json.loads(json.dumps(demo(**only)).replace(run_id, "0" * 26))})
        assert theirs.json()["detail"].replace(run_id, "") == absent.json()["detail"].replace("0" * 26, "")
        assert "or it is not yours" in theirs.json()["detail"]
    by_path = demo(corpus={"sources": [{"path": str(api.directory(run_id) / "corpus")}]})
    assert api.bob.post("/v1/runs", json={"config": by_path}).status_code == 422
    assert api.ann.post("/v1/runs", json={"config": by_path}).status_code == 422  # the output roots are no input roots


def test_a_name_means_the_callers_own_run(api: Service) -> None:
    finished(api)
    own = finished(api, "bob")
    answer = api.bob.post("/v1/runs", json={"config": start("first")})
    assert answer.json()["config"]["tokenizer"]["path"] == f"run://{own}/model"
    ambiguous = api.admin.post("/v1/runs", json={"config": start("first")})
    assert "2 finished runs have this name; choose one by its id" in ambiguous.json()["detail"]


def test_a_run_that_has_not_finished_is_no_start(api: Service) -> None:
    run_id = api.submit(name="first")["id"]
    assert (
        "this run is queued; choose a run that has succeeded"
        in api.ann.post("/v1/runs", json={"config": start(run_id)}).json()["detail"]
    )


NO_REFERENCES = (
    "run://{run}",
    "run://{run}/",
    "run://{run}/model/../../x",
    "run://{run}/checkpoints",
    "run://{run}/model?x=y",
    "run://../model",
    "run://./model",
    "run://%2e%2e/model",
    "run:///model",
    "RUN://{run}/model",
    "run:{run}/model",
    "run://{run}/model\n",
    "run://a b/model",
    "run://*/model",
)


def test_what_only_looks_like_a_reference_is_refused(api: Service) -> None:
    run_id = finished(api)
    for reference in NO_REFERENCES:
        model, corpus = (path.format(run=run_id) for path in (reference, reference.replace("/model", "/corpus")))
        for config in (demo(tokenizer={"path": model}), demo(corpus={"sources": [{"path": corpus}]})):
            answer = api.ann.post("/v1/runs", json={"config": config})
            assert answer.status_code == 422, answer.text


@pytest.mark.parametrize(
    "config",
    [
        demo(output="run://first/model"),
        demo(checkpoint={"storage": "run://first/model"}),
        demo(evaluation={"lm_eval": ["run://first/model"]}),
        demo(tokenizer={"path": "run://first/corpus"}),
        demo(corpus={"sources": [{"path": "run://first/model"}]}),
    ],
)
def test_a_run_stands_only_where_its_part_can_be_read(api: Service, config: dict[str, Any]) -> None:
    finished(api)
    assert api.ann.post("/v1/runs", json={"config": config}).status_code == 422


def test_the_driver_gets_paths_and_may_read_no_other_run(api: Service, tmp_path: Path) -> None:
    run_id, other = finished(api), finished(api, "bob", "other")
    made = api.ann.post("/v1/runs", json={"config": start(run_id)}).json()
    jobs = api.jobs
    assert isinstance(jobs, FakeJobs)
    Reconciler(api.database, jobs, api.pools, api.notifier, settings=api.settings, secret=b"secret").round(1.0)
    submission = jobs.submissions[f"{made['id']}-1"]
    directory = api.directory(run_id)
    request = json.loads(submission.config_path.read_text())
    assert request["model"]["init"]["checkpoint"] == request["tokenizer"]["path"] == str(directory / "model")
    assert submission.read_roots.roots == [tmp_path / "data"]
    assert set(submission.read_roots.own) == {
        directory / "model",
        directory / "corpus",
        api.directory(made["id"]).parent,
    }
    config = check_config(request)
    with reading_within(submission.read_roots):
        assert texts(config.corpus.sources[0]) == ["held out", "trained on"]
        with pytest.raises(Exception, match="leads out of the directories"):
            texts(Source(path=f"{api.directory(other)}/corpus/*/*.parquet"))


def texts(source: Source) -> list[str]:
    (item,) = expand_sources([source], Path("unused"), Limits(1024, 8192))
    units = plan_units([(item, list_files(item.field, item.settings).files)])
    return sorted(document.text for unit in units for document in documents_of(unit))


def test_a_run_that_is_gone_when_the_driver_starts_is_said_to_be(api: Service) -> None:
    run_id = finished(api)
    made = api.ann.post("/v1/runs", json={"config": start(run_id)}).json()
    assert api.ann.delete(f"/v1/runs/{run_id}").status_code == 409
    with api.database.write() as session:  # as after a return to an older copy of the database
        runs.delete(session, runs.lock(session, run_id))
    Reconciler(api.database, api.jobs, api.pools, api.notifier, settings=api.settings, secret=b"secret").round(1.0)
    request = json.loads(api.jobs.submissions[f"{made['id']}-1"].config_path.read_text())
    with pytest.raises(ConfigError, match=r"run://.*cannot be looked up"):
        check_config(request)


def test_without_a_service_a_reference_is_refused_with_what_to_do() -> None:
    for field, config in (
        ("tokenizer.path", demo(tokenizer={"path": "run://a/model"})),
        ("corpus.sources.0.path", demo(corpus={"sources": [{"path": "run://a/corpus"}]})),
    ):
        with pytest.raises(ConfigError, match="moedisco submit") as caught:
            check_config(config)
        assert caught.value.field == field
        assert caught.value.value.startswith("run://a/")
        assert check_config(config, for_service=True).name == "demo"
