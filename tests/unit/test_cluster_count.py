"""`clusters.count: auto`: the number of sub-models from experts and memory, which a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moedisco_ray.cli.display.plan import plan_view
from moedisco_ray.core.config import RunConfig, check_config, put
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.plan import GIB, build_plan, with_cluster_count

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "moe_intermediate_size": 64}
QWEN = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "vocab_size": 151_936,
}


def config_of(experts: int, top_k: int, slots: int, **sections: Any) -> RunConfig:
    return check_config(
        {
            "name": "x",
            "corpus": {"sources": [{"path": "embedded"}]},
            "clusters": {"count": "auto"},
            "model": {"config": {**SIZES, "num_experts": experts, "num_experts_per_tok": top_k}},
            "pools": {"low_memory": {"max_workers": slots}},
            **sections,
        }
    )


def decided(config: RunConfig) -> int:
    return with_cluster_count(config).cluster_count


@given(experts=st.integers(1, 96), top_k=st.integers(1, 8), slots=st.integers(1, 64))
def test_it_is_the_smallest_divisor_from_two_on_with_top_k_experts_in_each(
    experts: int, top_k: int, slots: int
) -> None:
    top_k = min(top_k, experts)
    found = decided(config_of(experts, top_k, slots))
    assert found == next(
        (count for count in range(2, experts + 1) if experts % count == 0 and experts // count >= top_k), 1
    )


@pytest.mark.parametrize(
    ("memory_gb", "slots", "count"),
    [
        (400, 60, 2),
        (27, 60, 15),  # groups of four experts, as many as a token selects
        (25, 60, 20),  # too small for four experts, not for three
        (25, 4, 20),  # more than there are slots: sub-models take turns
        (1, 60, 60),
    ],
)  # nothing fits, which the plan says
def test_memory_asks_for_smaller_groups(memory_gb: float, slots: int, count: int) -> None:
    optimizer = {
        "batch_tokens": 16_384,
        "micro_batch": 1,
        "precision": "pure_bf16",
        "moments": "full",
        "offload_moments": False,
        "block_steps": 0,
        "gradient_checkpointing": False,
    }
    config = config_of(
        1,
        1,
        slots,
        model={"family": "qwen2_moe", "config": QWEN},
        submodels={"optimizer": optimizer},
        pools={
            "low_memory": {"gpu": 1, "memory_gb": memory_gb, "max_workers": slots},
            "high_memory": {"gpu": 1, "memory_gb": 800},
        },
    )
    assert decided(config) == count
    stage = next(stage for stage in build_plan(config).stages if stage.stage == "submodels")
    assert (stage.units, stage.fits) == (count, memory_gb > 1)


def test_more_submodels_are_taken_where_fewer_would_recompute() -> None:
    """Qwen1.5-MoE on a card on which two sub-models fit only with recomputation, and more fit without.

    Before: 2, at 4/3 of the time and dollars.
    """
    optimizer = {"batch_tokens": 16_384, "micro_batch": 1, "precision": "pure_bf16", "moments": "full"}
    pinned = {"offload_moments": False, "block_steps": 0}

    def config(memory_gb: float, **changes: Any) -> RunConfig:
        return config_of(
            1,
            1,
            60,
            corpus={"sources": [{"path": "embedded"}], "sequence_length": 4096},
            model={"family": "qwen2_moe", "config": QWEN},
            submodels={"optimizer": {**optimizer, **pinned, **changes}},
            pools={
                "low_memory": {"gpu": 1, "memory_gb": memory_gb, "max_workers": 60},
                "high_memory": {"gpu": 1, "memory_gb": 800},
            },
        )

    def needs(count: int, *, recompute: bool) -> float:
        """Memory of a sub-model (GB)."""
        given = config(1000, gradient_checkpointing=recompute)
        plan = build_plan(given.model_copy(update={"clusters": given.clusters.model_copy(update={"count": count})}))
        return next(stage.memory.total for stage in plan.stages if stage.stage == "submodels") / GIB

    with_recomputation, without = needs(2, recompute=True), needs(2, recompute=False)
    assert without > with_recomputation + 1
    memory_gb = (with_recomputation + without) / 2
    fewest = next(count for count in (3, 4, 5, 6, 10, 12, 15) if needs(count, recompute=False) <= memory_gb)
    assert decided(config(memory_gb)) == fewest > 2
    assert decided(config(memory_gb, gradient_checkpointing=True)) == 2
    assert decided(config(without + 0.1)) == 2


def test_a_mixed_pool_has_the_slots_of_its_types() -> None:
    types = [
        {"name": name, "resource": name, "memory_gb": 24, "price_per_hour": 0.3, "speed": 0.5, "max_workers": 2}
        for name in "ab"
    ]
    assert decided(config_of(16, 2, 8, pools={"low_memory": {"types": types}})) == 2


def test_owners_have_a_cluster_and_a_seat_each() -> None:
    owners = {name: {"storage": f"/{name}", "resource": name} for name in "ab"}
    sources = [{"path": "embedded"}, *({"path": f"/{name}/text", "owner": name} for name in "ab")]
    sections = {
        "corpus": {"sources": sources},
        "finetune": {"keep_optimizer_state": False},
        "pools": {"low_memory": {"max_workers": 1}, "owners": owners},
    }
    assert decided(config_of(6, 2, 1, **sections)) == 3
    assert decided(config_of(8, 2, 1, **sections)) == 4  # the sub-models of text without an owner take turns
    with pytest.raises(ConfigError, match=r"clusters\.count: 'auto': finds no number: each of the 2 data owners"):
        with_cluster_count(config_of(2, 1, 1, **sections))


def test_a_number_stays_and_a_contradiction_is_an_error() -> None:
    config = config_of(8, 2, 8, clusters={"count": 8})
    assert with_cluster_count(config) is config
    with pytest.raises(ConfigError, match=r"submodels\.quorum: 5 is more than the 2 sub-models"):
        with_cluster_count(config_of(8, 2, 8, submodels={"quorum": 5}))


def test_the_plan_says_why() -> None:
    plan = build_plan(check_config(yaml.safe_load(preset_text("default")) | {"recipe": None}))
    console = Console(width=160)
    with console.capture() as text:
        console.print(plan_view(plan))
    assert "2 sub-models of 4 experts per layer (clusters.count: auto)" in text.get()
    assert {stage.stage: stage.units for stage in plan.stages} == {"seed": 1, "submodels": 2, "finetune": 1}


def test_a_run_keeps_its_number_when_the_pool_changes(tmp_path: Path) -> None:
    begun = config_of(8, 2, 8, output=str(tmp_path), clusters={"count": 4})
    pipeline.claim(begun, redo=False)
    assert read_json(begun.directory / "config.json")["clusters"]["count"] == 4
    assert decided(config_of(8, 2, 8, output=str(tmp_path))) == 4
    # of another model, to which the number does not apply
    assert decided(config_of(3, 1, 8, output=str(tmp_path))) == 3
    assert decided(config_of(8, 2, 8, output=str(tmp_path), name="other")) == 2


def test_a_report_of_a_run_that_was_asked_to_decide_is_possible_before_it_has_clusters() -> None:
    assert report_of(lambda _: None, config_of(8, 2, 8)).stages == []


def test_where_muon_does_not_fit_the_plan_proposes_what_adamw_allows() -> None:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    raw["model"]["config"] |= {"hidden_size": 3072, "num_hidden_layers": 24, "moe_intermediate_size": 6144}
    raw["clusters"]["count"] = 8  # as many as there are experts
    raw["pools"]["low_memory"]["memory_gb"] = 14
    raw["submodels"]["optimizer"] |= {"precision": "bf16", "batch_tokens": 4096, "micro_batch": 4}
    seed = build_plan(check_config(raw)).stages[0]
    assert seed.remedy is not None
    assert seed.remedy.fits
    assert seed.remedy.settings[:2] == ("submodels.optimizer.name=adamw", "finetune.optimizer.name=adamw")
    for setting in seed.remedy.settings:
        path, _, value = setting.partition("=")
        put(raw, path, yaml.safe_load(value))
    assert build_plan(check_config(raw)).stages[0].fits
