"""Runs for the web page to show: one that has just begun, steps of training, one that has succeeded."""

import json
import time

import run_example

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.export_summary import ExportSummary
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.stages.export.card import model_card
from service.database import runs
from service.domain.states import RunState

STARTED = {"name": "demo", "directory": "runs/demo", "stages": run_example.STAGES}


def begin(site, **changes):
    """A run whose driver has just begun."""
    run_id = site.service.submit(**changes)["id"]
    site.service.start(run_id)
    site.service.report(run_id, Event("run_started", data=STARTED))
    return run_id


def train(site, run_id, unit, first, last, stage="submodels"):
    steps = [
        Event(
            "progress",
            stage,
            unit,
            {
                "step": step,
                "steps": 400,
                "tokens": step * 1024,
                "loss": 8 - step / 100,
                "lr": 1e-3,
                "grad_norm": 0.7,
                "tokens_per_second": 10_240.0,
            },
        )
        for step in range(first, last)
    ]
    site.service.report(run_id, *steps)


POOLS = dict.fromkeys(("seed", "cluster", "submodels"), "low_memory") | dict.fromkeys(
    ("merge", "finetune", "evaluate", "export"), "high_memory"
)


def stages_of_a_run():
    """Every stage for a minute, held by a worker of its pool, while one slot of the high-memory pool idles at first."""
    now = time.time()
    events = [
        Event("run_started", data={**STARTED, "ways": run_example.stored_ways()}, time=now),
        Event("slots_free", data={"pool": "high_memory", "slots": 1}, time=now),
    ]
    for stage in run_example.STAGES:
        events.append(Event("stage_started", stage, time=now))
        if stage in POOLS:
            events.append(Event("workers_held", data={"hold": stage, "pool": POOLS[stage], "workers": 1}, time=now))
        if stage == "merge":
            events.append(Event("slots_free", data={"pool": "high_memory", "slots": 0}, time=now))
        units = []
        if stage in ("seed", "submodels", "finetune"):
            events.append(Event("unit_started", stage, stage, {"steps": 400, "tokens": 0, "workers": 1}, time=now + 6))
            units = [{"tokens": 360_000, "seconds": 50.0, "workers": 1}]
        now += 60
        if stage in POOLS:
            events.append(Event("workers_released", data={"hold": stage}, time=now))
        summary = {"units": units}
        events.append(Event("stage_finished", stage, data={"seconds": 60.0, "summary": summary}, time=now))
    return events


def bill_of(site, run_id, events):
    with site.service.database.read() as session:
        config = RunConfig.model_validate(runs.get(session, run_id).config)
    meter = Meter()
    for event in events:
        meter.update(event)
    return metered_bill(meter, config).model_dump(mode="json")


def finish(site):
    """A run that has succeeded, with everything it leaves behind."""
    run_id = begin(site)
    events = stages_of_a_run()
    site.service.report(run_id, *events)
    for k in range(4):
        train(site, run_id, f"submodel-{k}", 1 + k, 200)
        last = {"steps": 400, "tokens": 409_600, "loss": 4.0}
        site.service.report(run_id, Event("unit_finished", "submodels", f"submodel-{k}", last))
    report = run_example.report() | {
        "bill": bill_of(site, run_id, [*events, Event("run_finished", time=events[-1].time)])
    }
    for stage in report["stages"]:
        stage["dollars"] = sum(line["dollars"] for line in report["bill"]["lines"] if line["stage"] == stage["name"])
    report["clusters"]["balance"] = 1.05
    figures = report["evaluation"]["sources"][0]
    report["evaluation"]["owners"] = {"alice": {**figures, "stages": {"submodels": figures}}}
    report["evaluation"]["unseen"] = {
        **figures,
        "sources": [{**figures, "source": name} for name in ("novels", "letters")],
    }
    report["evaluation"] |= {"loss": 3.5, "start": {**figures, "loss": 4.25, "sources": []}}
    report["evaluation"]["lm_eval"] = [
        {
            "task": "arc_easy",
            "acc": 0.412,
            "acc_stderr": 0.01,
            "acc_norm": 0.388,
            "acc_norm_stderr": 0.01,
            "chance": 0.25,
            "examples": 2376,
        }
    ]
    files = {
        "report.json": json.dumps(report),
        "clusters/report.json": json.dumps(report["clusters"]),
        "model/config.json": "{}",
        "model/README.md": model_card(
            RunReport.model_validate(report), ExportSummary(parameters=1, active_parameters=1)
        ),
        "ray.log": "the driver began\nthe driver ended\n",
    }
    for name, text in files.items():
        path = site.service.directory(run_id) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    site.service.report(run_id, Event("run_finished", data={"seconds": 60.0}, time=events[-1].time))
    site.service.bring(run_id, RunState.SUCCEEDED)
    return run_id
