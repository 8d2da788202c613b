"""Proofs that are generated for every declared family, from a small model that transformers itself makes and stores."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import LENGTH, MIXED, VOCAB, built, random_tensors, top_k_of
from safetensors.torch import load_file, save_file
from tiny_training import RECIPE, V, write_shard
from transformers import AutoConfig, AutoModelForCausalLM

from moedisco_ray.core.config import FAMILIES, Architecture, Model, RunConfig, check_config, read_architecture
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS, REFUSED
from moedisco_ray.models import (
    ModelMap,
    Role,
    check_same,
    config_values,
    hf_config,
    open_checkpoint,
    read_config,
    specialise,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.plan import count_parameters
from moedisco_ray.stages.decompose import write_submodels
from moedisco_ray.stages.merge.tensors import merge
from moedisco_ray.training import TrainJob, World, train
from moedisco_ray.training.sharding import trainable

EXPERTS = 8
TOKENS = torch.arange(2 * LENGTH).reshape(2, LENGTH).mul(7) % VOCAB
SPECIAL: dict[str, dict[str, Any]] = {
    "first_k_dense_replace": {"first_k_dense_replace": 1, "intermediate_size": 40},
    "n_group": {"n_group": 4, "topk_group": 2},
    "q_lora_rank": {"q_lora_rank": 12, "kv_lora_rank": 10},
    "attention_bias": {"attention_bias": True},
    "lm_head_bias": {"lm_head_bias": True},
    "topk_method": {"topk_method": "group_limited_greedy"},
    "use_qk_norm": {"use_qk_norm": True},
    "routed_scaling_factor": {"routed_scaling_factor": 2.5},
    "n_shared_experts": {"n_shared_experts": 2},
    "moe_layer_start_index": {"moe_layer_start_index": 1, "intermediate_size": 40},
    "moe_num_shared_experts": {"moe_num_shared_experts": 2},
    "full_attention_interval": MIXED,
    "score_scale_factor": {"score_scale_factor": 4.0, "gate_hidden_size": 12},
}
"""Configuration fields to try, by a field that a family must have."""
Ready = Callable[[str], tuple[Path, torch.Tensor]]


def sizes_of(family: str, **changes: Any) -> Architecture:
    known = DECLARATIONS[family].fields
    fields = {name: value for own, values in SPECIAL.items() if own in known for name, value in values.items()}
    return Architecture(
        **{
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "moe_intermediate_size": 16,
            "num_experts": EXPERTS,
            "num_experts_per_tok": top_k_of(family, 3),
            "initializer_range": 0.2,
            "fields": fields | changes.pop("fields", {}),
            **changes,
        }
    )


def stored(family: str, directory: Path, **changes: Any) -> Path:
    """A model with all tensors random, as transformers stores it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(hf_config(family, sizes_of(family, **changes), VOCAB, LENGTH, 0))
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(directory)
    return directory


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = AutoModelForCausalLM.from_pretrained(directory).eval()(TOKENS).logits
    return found


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """Makes a model of a family and its logits, once. To be read, not written."""

    @functools.cache
    def made(family: str) -> tuple[Path, torch.Tensor]:
        directory = stored(family, tmp_path_factory.mktemp(family))
        return directory, logits(directory)

    return made


@pytest.mark.ecosystem("Start: MoE of every family", "transformers", "torch")
@pytest.mark.parametrize("clusters", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_decompose_and_merge_keep_every_bit_and_the_function(
    ready: Ready, family: str, clusters: int, tmp_path: Path
) -> None:
    directory, expected = ready(family)
    source = open_checkpoint(directory)
    config = read_config(source.directory)
    write_submodels(source, config, clusters, tmp_path / "parts")
    parts = [open_checkpoint(tmp_path / "parts" / str(number)) for number in range(clusters)]
    joined = {
        report.key: tensor for tensor, report in merge(parts, parts[0], source.model_map, [1 / clusters] * clusters)
    }
    check_same(joined, source)
    write_checkpoint(tmp_path / "merged", joined.items(), config)
    assert torch.equal(logits(tmp_path / "merged"), expected)


@pytest.mark.parametrize(("family", "scoring"), [("deepseek_v2", "softmax"), ("deepseek_v3", "sigmoid")])
def test_a_new_model_names_the_scoring_of_its_router_for_vllm(family: str, scoring: str) -> None:
    assert DECLARATIONS[family].router.scores == scoring
    assert config_values(hf_config(family, sizes_of(family), VOCAB, LENGTH, 0))["scoring_func"] == scoring


def training_job(model: Path, home: Path) -> TrainJob:
    write_shard(home / "packed")
    return TrainJob(
        stage="submodels",
        name="k",
        model=model,
        packed_dirs=(home / "packed",),
        output=home / "out",
        checkpoints=home / "steps",
        steps=1,
        sequence_length=LENGTH,
        optimizer=RECIPE,
        checkpoint_every=None,
        load_balance=0.02,
        z_loss=0.01,
    )


@pytest.mark.parametrize(
    "experts", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_submodel_trains_a_step_and_its_router_if_it_has_a_choice(
    ready: Ready, family: str, experts: int, tmp_path: Path
) -> None:
    assert V == VOCAB
    source = open_checkpoint(ready(family)[0])
    write_submodels(source, read_config(source.directory), EXPERTS // experts, tmp_path / "parts")
    before = open_checkpoint(tmp_path / "parts" / "0")
    result = train(training_job(tmp_path / "parts" / "0", tmp_path), World(), lambda _: None, lambda: False)
    assert 0 < result.losses[0] < 50
    after = open_checkpoint(tmp_path / "out")
    assert list(after) == list(before)
    router = DECLARATIONS[family].router
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    for key in before:
        if source.model_map.classify(key).role is Role.ROUTER:
            untrained = {source.model_map.router_key(layer, name) for name in router.untrained for layer in range(3)}
            assert (key in moved) is (experts > 1 and key not in untrained), key
        elif source.model_map.classify(key).role is Role.EXPERT:
            assert experts > 1 or key in moved, key


@pytest.mark.ecosystem("Start: MoE of every family", "transformers", "torch")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_training_is_transformers_own(ready: Ready, family: str) -> None:
    source, _ = ready(family)
    loss = trainable(source, RECIPE, World())(TOKENS[:, :-1], TOKENS[:, 1:])
    expected = AutoModelForCausalLM.from_pretrained(source)(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(loss / (2 * (LENGTH - 1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_computes_what_two_copies_of_it_do(family: str) -> None:
    fields = {
        name: value for name, value in {"n_group": 1, "topk_group": 1}.items() if name in DECLARATIONS[family].fields
    }
    one, two = (
        config_values(
            hf_config(
                family, sizes_of(family, num_experts=count, num_experts_per_tok=count, fields=fields), VOCAB, LENGTH, 0
            )
        )
        for count in (1, 2)
    )
    names, tensors = ModelMap(family), random_tensors(one)
    copies = dict(tensors)
    for key, tensor in tensors.items():
        role = names.classify(key)
        if role.expert_axis is not None:
            copies[key] = torch.cat([tensor, tensor], dim=role.expert_axis)
        elif role.expert is not None:
            copies[names.renumbered(key, 1)] = tensor
    if names.family.router.scores == "sparse_mixer":  # the first of two equal experts has the weight 1/2, the second 1
        copies |= {key: tensor * 2 / 3 for key, tensor in copies.items() if names.classify(key).part == "down"}
    found = []
    for config, state in ((one, tensors), (two, copies)):
        model = built(config, state)
        found.append((specialise(model) if config is one else model)(TOKENS).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


GROUPED = [family for family in FAMILIES if DECLARATIONS[family].router.limits_groups]


@pytest.mark.parametrize(("clusters", "expected"), [(2, (2, 2, 6)), (4, (1, 1, 4)), (8, (1, 1, 2)), (16, (1, 1, 1))])
@pytest.mark.parametrize("family", GROUPED)
def test_a_submodel_has_whole_groups_of_experts_or_a_part_of_one(
    family: str, clusters: int, expected: tuple[int, int, int]
) -> None:
    limit = dict([DECLARATIONS[family].router.limit_field or ("n_group", 4)])
    sizes = sizes_of(family, num_experts=16, num_experts_per_tok=6, fields={"n_group": 4, "topk_group": 2, **limit})
    values = submodel_config(config_values(hf_config(family, sizes, VOCAB, LENGTH, 0)), 16 // clusters)
    assert (values["n_group"], values["topk_group"], values["num_experts_per_tok"]) == expected


def config_of(family: str, clusters: int, **changes: Any) -> RunConfig:
    sizes = sizes_of(family, **changes).model_dump(exclude_unset=True) if family in DECLARATIONS else {}
    return check_config(
        {
            "name": "cut",
            "corpus": {"sources": [{"path": "embedded"}], "sequence_length": LENGTH},
            "model": {"family": family, "config": sizes},
            "tokens": {"total": 10_000},
            "clusters": {"count": clusters},
            "pools": {"low_memory": {"max_workers": 1}, "high_memory": {}},
        }
    )


@pytest.mark.parametrize("family", GROUPED)
def test_groups_that_a_submodel_would_cut_are_refused_in_one_line(family: str) -> None:
    limit = dict([DECLARATIONS[family].router.limit_field or ("n_group", 4)])
    line = (
        "clusters.count: 6 gives sub-models of 4 experts, which cut the router's groups of 6 experts; "
        "use 4 or a divisor or a"
    )
    with pytest.raises(ConfigError, match=line):
        config_of(family, 6, num_experts=24, fields={"n_group": 4, "topk_group": 2, **limit})


@pytest.mark.parametrize(
    "family",
    [
        family
        for family in FAMILIES
        if DECLARATIONS[family].router.least_in_group > 1
        and not DECLARATIONS[family].router.is_constant_alone(norm_topk_prob=False)
    ],
)
def test_one_expert_with_a_weight_that_depends_on_the_token_is_refused(family: str) -> None:
    with pytest.raises(
        ConfigError, match="leaves 1 expert per sub-model, and without norm_topk_prob the router needs 2"
    ):
        config_of(family, EXPERTS, norm_topk_prob=False, fields={"n_group": 1, "topk_group": 1})


@pytest.mark.parametrize("family", REFUSED)
def test_a_refused_family_is_answered_with_the_reason(family: str, tmp_path: Path) -> None:
    assert family not in DECLARATIONS
    reason = re.escape(f"is not supported, because {REFUSED[family]}; use one of mixtral, ")
    with pytest.raises(ConfigError, match=rf"^model\.family: '{family}': {reason}"):
        config_of(family, 2)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(CheckpointError, match=reason):
        read_architecture(tmp_path, "mixtral")
    for named in ({}, {"family": "mixtral"}):
        with pytest.raises(
            CheckpointError, match=rf"^model\.init\.upcycle: .* holds a model of '{family}', which {reason}"
        ):
            with_start(Model.model_validate({**named, "init": {"upcycle": str(tmp_path)}}))
    with pytest.raises(CheckpointError, match=reason):
        ModelMap(family)


def test_a_field_of_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fields\.kv_lora_rank: qwen3_moe has no such field; it has attention_bias"):
        config_of("qwen3_moe", 2, fields={"kv_lora_rank": 8})


@pytest.mark.parametrize(
    ("family", "field", "value", "allowed"),
    [
        ("deepseek_v2", "topk_method", "noaux_tc", "'greedy' or 'group_limited_greedy'"),
        ("ernie4_5_moe", "use_bias", True, "False"),
        ("ernie4_5_moe", "moe_layer_interval", 2, "1"),
        ("ernie4_5_moe", "moe_layer_end_index", 1, "2"),
    ],
)
def test_a_value_that_is_not_supported_is_refused(
    family: str, field: str, value: object, allowed: str, tmp_path: Path
) -> None:
    line = re.escape(f"{field} {value!r}: {family} is supported with {allowed} only; use another model")
    with pytest.raises(ConfigError, match=line):
        config_of(family, 2, fields={field: value})
    sizes = {"num_hidden_layers": 3, "moe_intermediate_size": 16, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **sizes, field: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json cannot be used: {line}"):
        read_architecture(tmp_path, family)


def test_layers_that_predict_further_tokens_are_left_out_by_their_prefix(tmp_path: Path) -> None:
    whole = stored("ernie4_5_moe", tmp_path / "model")
    tensors = load_file(whole / "model.safetensors")
    save_file(tensors | {"model.mtp_block.0.mlp.up_proj.weight": torch.zeros(1)}, whole / "model.safetensors")
    assert len(open_checkpoint(whole)) == len(open_checkpoint(stored("ernie4_5_moe", tmp_path / "without")))


ERNIE = {
    "hidden_size": 2560,
    "intermediate_size": 12_288,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "vocab_size": 103_424,
    "tie_word_embeddings": True,
    "use_bias": False,
    "rope_theta": 500_000,
}


@pytest.mark.parametrize(
    ("family", "published", "experts", "top_k", "billions"),
    [
        ("ernie4_5_moe", ERNIE, 64, 6, 21.8),
        # those of transformers' defaults, in the form of older transformers
        ("glm4_moe_lite", {"first_k_dense_replace": 1}, 64, 4, 29.9),
        ("minimax_m2", {"rotary_dim": 64, "num_mtp_modules": 3}, 256, 8, 228.7),
        ("hy_v3", {"first_k_dense_replace": 1, "num_nextn_predict_layers": 1}, 192, 8, 295.0),
        ("sarvam_mla", {"num_experts": 128, "num_shared_experts": 1}, 128, 8, 106.0),
    ],
)
def test_a_published_configuration_is_read(
    tmp_path: Path, family: str, published: dict[str, Any], experts: int, top_k: int, billions: float
) -> None:
    known = AutoConfig.for_model(family).to_dict()
    lists = {"mlp_layer_types", *(name for name in published)}
    left = {} if published is ERNIE else {name: value for name, value in known.items() if name not in lists}
    (tmp_path / "config.json").write_text(json.dumps({**left, "model_type": family, **published}))
    sizes = read_architecture(tmp_path, family)
    assert (sizes.num_experts, sizes.num_experts_per_tok) == (experts, top_k)
    count = count_parameters(family, sizes, int({**known, **published}["vocab_size"]))
    assert count.total == pytest.approx(billions * 1e9, rel=0.01)
