"""Runs for the web page to show: one that has just begun, steps of training, one that has succeeded."""

import json

import run_example

from moedisco_ray.events import Event
from service.domain.states import RunState


def begin(site, **changes):
    """A run whose driver has just begun."""
    run_id = site.service.submit(**changes)["id"]
    site.service.start(run_id)
    site.service.report(run_id, Event("run_started", data={"name": "demo", "directory": "runs/demo", "stages": run_example.STAGES}))
    return run_id


def train(site, run_id, unit, first, last, stage="submodels"):
    steps = [
        Event("progress", stage, unit, {
            "step": step, "steps": 400, "tokens": step * 1024, "loss": 8 - step / 100, "lr": 1e-3, "grad_norm": 0.7,
            "tokens_per_second": 10_240.0})
        for step in range(first, last)]
    site.service.report(run_id, *steps)


def finish(site):
    """A run that has succeeded, with everything it leaves behind."""
    run_id = begin(site)
    for stage in run_example.STAGES:
        site.service.report(
            run_id, Event("stage_started", stage), Event("stage_finished", stage, data={"seconds": 5.0, "summary": {}}))
    for k in range(4):
        train(site, run_id, f"submodel-{k}", 1 + k, 200)
        last = {"steps": 400, "tokens": 409_600, "loss": 4.0}
        site.service.report(run_id, Event("unit_finished", "submodels", f"submodel-{k}", last))
    report = run_example.report()
    report["clusters"]["balance"] = 1.05
    figures = report["evaluation"]["sources"][0]
    report["evaluation"]["unseen"] = {**figures, "sources": [{**figures, "source": name} for name in ("novels", "letters")]}
    report["evaluation"]["lm_eval"] = [{
        "task": "arc_easy", "acc": 0.412, "acc_stderr": 0.01, "acc_norm": 0.388, "acc_norm_stderr": 0.01, "chance": 0.25,
        "examples": 2376}]
    files = {
        "report.json": json.dumps(report), "clusters/report.json": json.dumps(report["clusters"]),
        "model/config.json": "{}", "ray.log": "the driver began\nthe driver ended\n"}
    for name, text in files.items():
        path = site.service.directory(run_id) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    site.service.report(run_id, Event("run_finished", data={"seconds": 60.0}))
    site.service.bring(run_id, RunState.SUCCEEDED)
    return run_id
