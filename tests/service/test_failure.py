from __future__ import annotations

import io

import pytest
from api_client import demo
from rich.console import Console

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event
from service.commands.views import run_view
from service.domain.failure import Failure, failure_of
from service.domain.states import RunState
from service.schemas import RunDetail

CONFIG = RunConfig.model_validate(demo()).model_dump(mode="json")
UNITS = ["seed", "submodel-1", "submodel-10"]


def progress(stage, message, **data):
    return {"stages": {stage: {"status": "failed"}}, "ended": {"type": "run_failed", "message": message, **data}}


@pytest.mark.parametrize(
    ("stage", "setting"), [("seed", "submodels"), ("submodels", "submodels"), ("finetune", "finetune")]
)
def test_a_training_that_diverged_is_retried_at_half_its_learning_rate(stage, setting):
    lr = f"{setting}.optimizer.lr"
    found = failure_of(progress(stage, "the loss is not finite", error="DivergedError"), UNITS, CONFIG)
    assert found == Failure(stage, None, lr, {lr: CONFIG[setting]["optimizer"]["lr"] / 2}, "half the learning rate")


def test_the_training_is_the_one_that_the_message_names():
    found = failure_of(progress("submodels", "2 of 4 can no longer finish: submodel-10: out of memory"), UNITS, CONFIG)
    assert (found.unit, found.changes) == ("submodel-10", {})


def test_a_mistake_of_a_setting_leads_to_the_setting():
    wrong = progress("corpus", "corpus.sources.0: no text", error="CorpusError", field="corpus.sources.0")
    assert failure_of(wrong, UNITS, CONFIG).setting == "corpus.sources.0"
    place = progress("corpus", "/data/a.txt: binary", error="CorpusError", field="/data/a.txt")
    assert failure_of(place, UNITS, CONFIG).setting is None


@pytest.mark.parametrize("config", [{}, {"submodels": None}, {"submodels": {"optimizer": {"lr": "fast"}}}])
def test_without_a_readable_configuration_nothing_is_proposed(config):
    found = failure_of(progress("seed", "no", error="NotFiniteError"), UNITS, config)
    assert (found.stage, found.changes) == ("seed", {})
    assert failure_of({}, [], config) == Failure(None, None, None, {}, "")


def test_a_failed_run_says_where_and_what_may_help(api):
    run = api.submit()["id"]
    api.start(run)
    start = Event("unit_started", "submodels", "submodel-1", {"steps": 100, "tokens": 0, "workers": 1})
    reason = "submodel-1: the loss of step 7 is nan; lower the learning rate, or lengthen its warm-up"
    failed = Event("run_failed", data={"message": reason, "error": "DivergedError"})
    api.report(run, Event("run_started"), Event("stage_started", "submodels"), start, failed)
    assert api.ann.get(f"/v1/runs/{run}").json()["failure"] is None, "it is not decided yet"
    api.bring(run, RunState.FAILED)
    detail = RunDetail.model_validate(api.ann.get(f"/v1/runs/{run}").json())
    assert detail.failure.unit == "submodel-1"
    assert detail.failure.changes == {"submodels.optimizer.lr": detail.config["submodels"]["optimizer"]["lr"] / 2}
    shown = io.StringIO()
    Console(file=shown, width=200).print(run_view(detail, ()))
    assert f"Its log: moedisco logs {run} --unit submodel-1" in shown.getvalue()
    assert f"moedisco retry {run} --set submodels.optimizer.lr=0.0005" in shown.getvalue()
    retry = api.ann.post(f"/v1/runs/{run}/retry", json={"changes": detail.failure.changes}).json()
    assert retry["config"]["submodels"]["optimizer"]["lr"] == 0.0005
