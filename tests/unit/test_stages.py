"""Which stages a changed setting makes again, and that every setting belongs to a stage or has a reason not to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.effects import NoEffect, Resolved, leaves
from moedisco_ray.core.stages import STAGES, alike, changed_settings, fingerprints

ORDER = [stage.name for stage in STAGES]
LEAVES = {leaf.path: leaf.marker for leaf in leaves(RunConfig)}
READ = {path for stage in STAGES for path in stage.settings}
SMALL = {"num_experts": 4, "num_experts_per_tok": 2}


def config_of(**sections: Any) -> RunConfig:
    return check_config({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, **sections})


def digests(**sections: Any) -> dict[str, str]:
    return fingerprints(config_of(**sections))


def remade(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [name for name in ORDER if before[name] != after[name]]


def from_stage(first: str) -> list[str]:
    return ORDER[ORDER.index(first) :]


@pytest.mark.parametrize(("path", "marker"), LEAVES.items())
def test_a_setting_is_in_a_fingerprint_or_is_marked_with_a_reason(
    path: str, marker: NoEffect | Resolved | None
) -> None:
    assert (path in READ) == (marker is None)


@pytest.mark.parametrize("stage", STAGES, ids=ORDER)
def test_a_stage_reads_only_settings_that_exist_and_have_an_effect(stage: Any) -> None:
    for path in stage.reads:
        found = [marker for leaf, marker in LEAVES.items() if leaf == path or leaf.startswith(f"{path}.")]
        assert None in found, f"{path} is no setting, or none that results depend on"


def test_a_reason_is_given_in_words() -> None:
    assert all(len(marker.reason.split()) > 3 for marker in LEAVES.values() if isinstance(marker, NoEffect))


GPU = {"pools": {"low_memory": {"gpu": 1}}}
BOTH = {"pools": {"low_memory": {"gpu": 1}, "high_memory": {"gpu": 1}}}
OLD = {"name": "old", "resource": "old_gpu", "card": "T4", "price_per_hour": 0.2}
RESOLVED: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "model.family": ({}, {"model": {"family": "mixtral"}}, "seed"),
    "pools.low_memory.gpu": ({}, GPU, "seed"),
    "pools.low_memory.card": (GPU, {"pools": {"low_memory": {"gpu": 1, "card": "T4"}}}, "seed"),
    "pools.low_memory.types": (GPU, {"pools": {"low_memory": {"gpu": 1, "types": [OLD]}}}, "seed"),
    "pools.high_memory.card": (BOTH, {"pools": {**GPU["pools"], "high_memory": {"gpu": 1, "card": "T4"}}}, "finetune"),
    "pools.high_memory.gpu": (GPU, BOTH, "finetune"),
    "finetune.pool": (GPU, {**GPU, "finetune": {"pool": "low_memory"}}, "finetune"),
    "submodels.seed_members": (
        {"submodels": {"sync_every": 5}},
        {"submodels": {"sync_every": 5, "seed_members": 2}},
        "seed",
    ),
    "submodels.optimizer.precision": ({}, {"submodels": {"optimizer": {"precision": "bf16"}}}, "seed"),
    "export.keep_apart": ({}, {"export": {"keep_apart": "always"}}, "evaluate"),
    "finetune.optimizer.precision": ({}, {"finetune": {"optimizer": {"precision": "bf16"}}}, "finetune"),
}
"""Per resolved setting: configurations that differ in it, and the first stage that notices."""


def test_every_resolved_setting_has_an_example() -> None:
    assert RESOLVED.keys() == {path for path, marker in LEAVES.items() if isinstance(marker, Resolved)}


@pytest.mark.parametrize(("before", "after", "first"), RESOLVED.values(), ids=RESOLVED)
def test_another_decided_value_makes_again_what_depends_on_it(
    before: dict[str, Any], after: dict[str, Any], first: str
) -> None:
    assert remade(digests(**before), digests(**after)) == from_stage(first)
    assert changed_settings(config_of(**before), config_of(**after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"model": {"family": "qwen3_moe"}}),
        ({}, {"finetune": {"pool": "low_memory"}}),
        ({}, {"submodels": {"optimizer": {"precision": "fp32"}}}),
        (
            {"submodels": {"optimizer": {"precision": "fp32"}}},
            {"submodels": {"optimizer": {"precision": "fp32"}}, **GPU},
        ),
        ({}, {"pools": {"low_memory": {"max_workers": 2, "price_per_hour": 1.0}}}),
        ({}, {"checkpoint": {"every": 7}}),
        ({}, {"tracking": {"trackers": {"tensorboard": True}}}),
        ({}, {"submodels": {"quorum": 2}, "checkpoint": {"max_failures": 9}}),
    ],
)
def test_where_and_when_work_happens_changes_nothing(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert digests(**before) == digests(**after)
    assert changed_settings(config_of(**before), config_of(**after)) == []


@pytest.mark.parametrize(
    ("section", "setting", "value", "first"),
    [
        ("corpus", "sources", [{"path": "embedded", "map": "clean:keep"}], "corpus"),
        ("clusters", "vectors", "random", "cluster"),
        ("clusters", "capacity", None, "cluster"),
        ("submodels", "lora", {"alpha": 8.0}, "submodels"),
        ("merge", "backbone", "uniform", "merge"),
        ("merge", "calibration_tokens", 4096, "merge"),
        ("finetune", "z_loss", 0.5, "finetune"),
        ("evaluation", "max_tokens", 5, "evaluate"),
        ("evaluation", "sources", [{"path": "s3://bucket/other"}], "evaluate"),
        ("export", "dtype", "bf16", "export"),
    ],
)
def test_a_setting_changes_its_stage_and_those_after_it_alone(
    section: str, setting: str, value: Any, first: str
) -> None:
    changes = {section: {setting: value}}
    assert remade(digests(), digests(**changes)) == from_stage(first)
    before, after, files = config_of(), config_of(**changes), {"corpus": "a", "evaluate": "b"}
    stay = [name for name, digest in fingerprints(before, files).items() if fingerprints(after, files)[name] == digest]
    assert list(alike(before, after)) == stay


def test_bits_of_a_sync_change_the_trainings_that_have_syncs() -> None:
    for members, first in ((1, "submodels"), (2, "seed")):
        exact = {"sync_every": 5, "seed_members": members}
        assert remade(digests(submodels=exact), digests(submodels={**exact, "sync_bits": 4})) == from_stage(first)


def test_deterministic_kernels_change_all_trainings() -> None:
    changed = {name for name, before in digests().items() if before != digests(deterministic=True)[name]}
    assert changed == set(from_stage("seed"))


def test_router_losses_belong_to_the_first_stage_whose_model_has_several_experts() -> None:
    model = {"model": {"config": SMALL}, "clusters": {"count": 2}}
    assert remade(digests(**model), digests(**model, finetune={"load_balance": 0.5})) == from_stage("seed")


@pytest.mark.parametrize(("reader", "first"), [("corpus", "corpus"), ("evaluate", "evaluate")])
def test_a_changed_file_changes_the_stage_that_reads_it_and_those_after_it(reader: str, first: str) -> None:
    config = config_of()
    assert remade(fingerprints(config, {reader: "a"}), fingerprints(config, {reader: "b"})) == from_stage(first)
