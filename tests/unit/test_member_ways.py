"""The way `members`: its row in the plan's table, `recipe: members`, and that the run's model is what they trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import OneCorpus, small_config

from moedisco_ray.backend import Trained
from moedisco_ray.core.config import Optimizer, Outer, RunConfig, check_config
from moedisco_ray.core.config.presets import LocalCard, on_own_cards, preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.run_directory import create, write_config
from moedisco_ray.models import check_same, open_checkpoint
from moedisco_ray.plan import Plan, build_plan, decided
from moedisco_ray.plan.build import too_large
from moedisco_ray.plan.resolve import resolve
from moedisco_ray.training import TrainJob

NAME = "8 members on 8 x L4, in step every 16 steps"


def card(gb: float) -> dict[str, Any]:
    return {"memory_gb": gb, "card": None, "speed": 1.0}


def asked(recipe: str | None = "members", low: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": recipe}
    raw["pools"]["low_memory"] |= low or {}
    for name, values in sections.items():
        raw[name] = raw[name] | values if isinstance(values, dict) else values
    return check_config(raw)


class Noting(OneCorpus):
    """Notes the jobs that the pipeline hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[TrainJob] = []

    def train_all(self, jobs: Sequence[TrainJob], *others: Any, **named: Any) -> list[Trained]:
        self.jobs += jobs
        return super().train_all(jobs, *others, **named)


def row(plan: Plan) -> Any:
    [found] = [way for way in plan.alternatives if way.way == "members"]
    return found


def test_members_have_a_row_with_an_unknown_gap_and_the_time_of_their_network() -> None:
    fast, slow = (row(build_plan(asked("auto", {"network": network}))) for network in (1.0, 0.25))
    assert (fast.name, fast.workers, fast.gap, fast.limit) == (NAME, 8, None, None)
    assert slow.seconds > 2 * fast.seconds
    none = row(build_plan(asked("auto", card(1.6))))
    assert "seed needs" in none.limit
    assert re.search(r"; with the weights in main memory: needs a machine with \d+ GiB of main memory", none.limit)
    assert none.limit.endswith("set pools.low_memory.host_memory_gb")


def test_where_the_card_lacks_memory_members_stream_and_both_memories_count() -> None:
    roomy, small = (build_plan(asked(low=card(gb) | {"host_memory_gb": 64})) for gb in (24, 1.6))
    streamed = "8 members on 8 x low-memory card, streamed from main memory, in step every 16 steps"
    assert str(small.recipe).startswith(f"recipe members: {streamed}")
    [near], [far] = roomy.stages, small.stages
    weights = far.parameters.total
    assert (near.memory.streamed, near.memory.host) == (0, 0)
    assert far.fits
    assert far.memory.streamed >= 4 * weights
    assert near.memory.synced - far.memory.synced == 4 * weights  # a checkpoint's copy
    assert 8 * weights < far.memory.synced < 8 * weights + 128 * 2**20
    assert far.cost.hours > 1.2 * near.cost.hours  # each layer is computed twice
    assert far.sync == near.sync
    found = {each.stage: each for each in small.storage}["seed"]
    assert found.worker_memory == far.memory.on_host == far.memory.host + far.memory.synced


@pytest.mark.parametrize(("gb", "words"), [(24, "seed needs 1.5 GiB of main memory per card for syncs"), (1.6, "")])
def test_a_machine_without_the_main_memory_for_syncs_is_left_out_by_name(gb: float, words: str) -> None:
    low = card(gb) | {"host_memory_gb": 4.5}
    limit = row(build_plan(asked("auto", low))).limit
    assert words in limit
    assert re.search(r"seed streams from 1\.8 GiB per card, 1\.0 GiB of it for syncs, and its machine has", limit)
    with pytest.raises(ConfigError, match=r"^recipe: 'members': is impossible \(.*for syncs"):
        decided(asked(low=low))
    begun = decided(asked(low=card(gb)))[0] if words else decided(asked(low=card(gb) | {"memory": "streamed"}))[0]
    pools = begun.pools
    less = pools.low_memory.model_copy(update={"host_memory_gb": 4.5})
    plan = build_plan(begun.model_copy(update={"pools": pools.model_copy(update={"low_memory": less})}))
    [problem] = [each.problem for each in too_large(plan)]
    assert str(problem).startswith("pools.low_memory.host_memory_gb: 4.5: seed ")  # with which a run ends


def test_members_train_with_the_settings_that_a_plan_chooses_for_the_seed() -> None:
    run = resolve(asked(low=card(2.6))).config
    assert (run.pools.low_memory.memory, run.submodels.optimizer.precision) == ("resident", "pure_bf16")
    exact = resolve(asked(low=card(2.6) | {"host_memory_gb": 64})).config
    assert (exact.pools.low_memory.memory, exact.submodels.optimizer.precision) == ("streamed", "auto")


def test_the_recipe_trains_the_whole_model_in_one_phase_of_members() -> None:
    config = decided(asked())[0]
    joint, optimizer = config.finetune.optimizer, config.submodels.optimizer
    assert (config.cluster_count, config.seed_members, config.submodels.sync_every, config.submodels.sync_bits) == (
        1, 8, 16, 4,
    )  # fmt: skip
    assert (config.tokens.seed, config.tokens.submodels, config.tokens.finetune) == (config.tokens.total, 0, 0)
    # together the batch of joint training; at an equal rate their mean would act like a rate lower by sqrt(8)
    assert (8 * optimizer.batch_tokens, optimizer.lr) == (
        joint.batch_tokens,
        pytest.approx(joint.lr * 8**0.5, rel=1e-5),
    )
    assert config.submodels.outer == (Outer(lr=0.7, momentum=0.6) if joint.name == "muon" else Outer())
    assert {pool.name for pool, _ in config.needed_pools} == {"low_memory"}
    plan = build_plan(asked())
    assert [(stage.stage, stage.units, stage.workers) for stage in plan.stages] == [("seed", 8, 8)]
    assert plan.alternatives[-1].name == f"this run: {NAME}"
    assert plan.alternatives[-1].gap is None
    assert "members" not in [way.way for way in plan.alternatives]
    assert plan.recipe == (
        f"recipe members: {NAME}, because the configuration says so; how much higher its loss ends is not known"
    )


def test_members_with_adamw_are_averaged() -> None:
    adamw = {"optimizer": Optimizer(name="adamw", batch_tokens=65_536).model_dump()}
    config = decided(asked(finetune=adamw, submodels=adamw))[0]
    assert (config.submodels.optimizer.name, config.submodels.outer) == ("adamw", Outer())


def test_no_verdict_and_no_recipe_takes_members_while_their_gap_is_unknown() -> None:
    """On own cards, which cost nothing, they would be the fastest way."""
    raw = yaml.safe_load(on_own_cards(preset_text("default"), [LocalCard("NVIDIA GeForce RTX 4090", 24.0)], 64))
    raw["pools"]["low_memory"] |= {"max_workers": 4, "gpus_per_node": 1, "network": 1.0}
    plan = build_plan(check_config(raw))
    fitting = [way for way in plan.alternatives if way.seconds is not None and way.way != "half"]
    assert min(fitting, key=lambda way: way.seconds or 0.0).way == "members"
    assert "members" not in str(plan.recipe)
    assert not str(plan.verdict).startswith("On these machines 4 members")
    assert "how much higher its loss ends is not known." in str(plan.verdict)


@pytest.mark.parametrize(
    ("low", "sections", "reason"),
    [
        ({"gpus_per_node": 4}, {}, "members have a machine each, and pools.low_memory.gpus_per_node is 4; set it to 1"),
        ({"max_workers": 1}, {}, "members divide the batch of the fine-tune on two machines or more"),
        ({"memory": "streamed", "host_memory_gb": 4}, {}, "seed streams from"),
        ({"memory_gb": 1.2, "card": None, "speed": 1.0}, {}, "seed needs"),
        (
            {},
            {"model": {"init": {"upcycle": "dense", "num_experts": 8}}, "tokens": {"seed_share": 0.5}},
            "members train from random weights or from a trained MoE",
        ),
    ],
)
def test_where_members_have_no_place_the_recipe_is_refused_with_the_reason(
    low: dict[str, Any], sections: dict[str, Any], reason: str
) -> None:
    raw = asked(low=low).model_dump()
    for name, values in sections.items():
        raw[name] |= values
    with pytest.raises(ConfigError, match=r"^recipe: 'members': is impossible \(") as refused:
        decided(RunConfig.model_validate(raw))
    assert reason in str(refused.value)


def test_a_run_of_members_keeps_the_way_that_it_began_with(tmp_path: Path) -> None:
    def of(slots: int) -> RunConfig:
        config = asked(low={"max_workers": slots})
        return config.model_copy(update={"name": "kept", "output": tmp_path})

    began = resolve(of(8)).config
    create(began.directory)
    write_config(began)
    fewer = resolve(of(4)).config
    assert fewer.seed_members == 8
    for name in ("tokens", "clusters", "submodels", "merge", "finetune"):
        assert getattr(fewer, name) == getattr(began, name)


def test_the_model_of_the_run_is_what_the_members_trained(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    members = {"sync_every": 8, "sync_bits": 4, "seed_members": 2, "outer": {"lr": 0.7, "momentum": 0.6}}
    config = small_config(
        tmp_path,
        model={"config": sizes},
        tokens={"total": 12_000, "seed_share": 1, "finetune_share": 0},
        clusters={"count": 1},
        merge={"router": "kept"},
        submodels={"optimizer": {"batch_tokens": 256, "lr": 2e-3}, **members},
        pools={"low_memory": {"memory": "streamed"}},
    )
    backend = Noting()
    directory = pipeline.run(config, backend=backend)
    assert [(job.name, job.memory, job.share.members) for job in backend.jobs] == [
        ("seed-0", "streamed", 2),
        ("seed-1", "streamed", 2),
    ]
    assert {(job.sync.bits, job.sync.scope) for job in backend.jobs if job.sync is not None} == {(4, "all")}
    trained = dict(open_checkpoint(directory / "seed"))
    check_same(dict(open_checkpoint(directory / "finetuned")), trained)
    manifest = read_manifest(directory / "seed")
    assert manifest is not None
    syncs = manifest.summary["syncs"]
    elements = sum(tensor.numel() for tensor in trained.values())
    assert len(syncs) == 3
    assert all(sent <= 0.15 * 4 * elements for sync in syncs for sent in sync["bytes"].values())
