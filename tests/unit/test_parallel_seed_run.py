"""Runs whose seed several members train together: what they record, and that a killed one continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_run import OneCorpus, begin_at, small_config

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import read_stored_config
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.models import check_same, open_checkpoint
from moedisco_ray.plan import build_plan

BATCH, MEMBERS = 256, 3
SETTINGS: dict[str, Any] = {
    "tokens": {"total": 24_000, "seed_share": 0.4, "finetune_share": 0.3},
    "model": {
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        }
    },
    "clusters": {"count": 2, "vectors": "hidden_state"},
    "submodels": {"optimizer": {"batch_tokens": BATCH, "lr": 2e-3}, "sync_every": 4, "seed_members": MEMBERS},
    "finetune": {"optimizer": {"batch_tokens": BATCH, "lr": 1e-3}},
    "merge": {"calibration_tokens": 1024},
    "checkpoint": {"every": 5},
    "evaluation": {"max_tokens": 3000, "every_tokens": 3 * MEMBERS * BATCH},
}
BATCHES = 9_600 // BATCH
STEPS = [13, 12, 12]
"""Steps of the members: together they take all batches of the phase."""


def config_at(output: Path, **changes: Any) -> RunConfig:
    return small_config(output, **SETTINGS).model_copy(update=changes)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(config_at(tmp_path_factory.mktemp("runs")), backend=OneCorpus())


def seed_summary(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory / "seed")
    assert manifest is not None
    return manifest.summary


def test_the_summary_has_a_unit_per_member_and_the_sync_points(directory: Path) -> None:
    summary = seed_summary(directory)
    names = [f"seed-{k}" for k in range(MEMBERS)]
    assert [(unit["name"], unit["steps"], unit["tokens"]) for unit in summary["units"]] == [
        (name, steps, steps * BATCH) for name, steps in zip(names, STEPS, strict=True)
    ]
    assert [list(sync["members"]) for sync in summary["syncs"]] == [names] * 3
    seed = open_checkpoint(directory / "seed")
    model_bytes = sum(4 * seed[key].numel() for key in seed)
    assert all(sync["bytes"][names[0]] == model_bytes for sync in summary["syncs"])
    assert not (directory / "checkpoints").exists()


def test_sub_models_start_from_the_common_model_and_the_first_members_optimizer_state(directory: Path) -> None:
    seed, decomposed = open_checkpoint(directory / "seed"), open_checkpoint(directory / "decomposed" / "0")
    assert all((decomposed[key] == seed[key]).all() for key in seed if "gate.weight" not in key)
    assert read_json(directory / "seed" / "optimizer_state" / "steps.json") == {"steps": STEPS[0]}
    assert read_json(directory / "submodels" / "0" / "optimizer_state" / "steps.json")["steps"] > STEPS[0]


def test_the_report_counts_all_members(directory: Path) -> None:
    report = read_json(directory / "report.json")
    row = next(stage for stage in report["stages"] if stage["name"] == "seed")
    assert (row["workers"], row["tokens"]) == (2, BATCHES * BATCH)  # the pool has two slots
    assert {unit for unit, curve in report["curves"].items() if curve["stage"] == "seed"} == {
        f"seed-{k}" for k in range(MEMBERS)
    }


def test_the_plan_prices_the_tokens_that_every_phase_trains(directory: Path) -> None:
    config = read_stored_config((directory / "config.json").read_bytes(), directory)
    trained = {
        stage["name"]: stage["tokens"] for stage in read_json(directory / "report.json")["stages"] if stage["tokens"]
    }
    plan = build_plan(config)
    assert {stage.stage: stage.cost.tokens for stage in plan.stages} == trained
    assert trained == {"seed": BATCHES * BATCH, "submodels": 7_200 // BATCH * BATCH, "finetune": 7_200 // BATCH * BATCH}
    assert plan.tokens == sum(stage.cost.tokens for stage in plan.stages)


def test_only_the_first_member_measures_the_held_out_loss_over_the_tokens_of_all(directory: Path) -> None:
    measured = [
        (event.unit, event.data["step"], event.data["tokens"])
        for event in EventLog.read(directory / "events.jsonl")
        if event.type == "evaluation" and event.stage == "seed"
    ]
    assert measured == [
        ("seed-0", step, tokens * BATCH) for step, tokens in ((3, 9), (6, 18), (9, 27), (12, 36), (STEPS[0], BATCHES))
    ]


def test_the_bill_has_the_seconds_of_all_members(directory: Path) -> None:
    meter = Meter()
    for event in EventLog.read(directory / "events.jsonl"):
        meter.update(event)
    units = seed_summary(directory)["units"]
    held = sum(unit["held"]["low_memory"] for unit in units)
    assert meter.usage["seed"]["low_memory"] == pytest.approx(held, abs=0.5)
    assert sum(unit["tokens"] for unit in units) == BATCHES * BATCH


class Killed(Exception):  # noqa: N818 - what happens to the process, not an error of ours
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        ("sync", None, 2),
        *(
            pytest.param(moment, marks=pytest.mark.slow)
            for moment in (
                ("progress", "seed-1", 6),
                ("progress", "seed-2", STEPS[2]),
                ("sync", None, 3),
                ("evaluation", "seed-0", STEPS[0]),
            )
        ),
    ],
)
def test_killed_in_the_seed_it_ends_with_the_seed_of_the_undisturbed_run(
    directory: Path, tmp_path: Path, moment: tuple[str, str | None, int]
) -> None:
    config = config_at(tmp_path)

    def die(event: Event) -> None:
        number = event.data.get("sync" if event.type == "sync" else "step")
        if event.stage == "seed" and (event.type, event.unit, number) == moment:
            raise Killed

    begin_at("seed", config, directory)
    with pytest.raises(Killed):
        pipeline.run(config, (die,), backend=OneCorpus())
    assert not (config.directory / "seed").exists()
    with pytest.raises(Killed):
        pipeline.run(config, (stop_after_seed,), backend=OneCorpus())
    check_same(dict(open_checkpoint(config.directory / "seed")), dict(open_checkpoint(directory / "seed")))
    states = [sorted((run / "seed" / "optimizer_state").rglob("*.*")) for run in (config.directory, directory)]
    assert [path.name for path in states[0]] == [path.name for path in states[1]]
    assert [path.read_bytes() for path in states[0]] == [path.read_bytes() for path in states[1]]


def test_one_member_is_a_training_of_one_card(directory: Path, tmp_path: Path) -> None:
    config = config_at(tmp_path)
    alone = config.submodels.model_copy(update={"seed_members": 1})
    with pytest.raises(Killed):
        pipeline.run(config.model_copy(update={"submodels": alone}), (stop_after_seed,), backend=OneCorpus())
    summary = seed_summary(config.directory)
    assert [(unit["name"], unit["steps"]) for unit in summary["units"]] == [("seed", BATCHES)]
    assert "syncs" not in summary
    ours, theirs = (dict(open_checkpoint(run / "seed")) for run in (config.directory, directory))
    assert any(not ours[key].equal(theirs[key]) for key in ours)


def stop_after_seed(event: Event) -> None:
    if event.type == "stage_finished" and event.stage == "seed":
        raise Killed
