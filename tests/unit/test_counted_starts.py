"""Parameters of every start as the plan counts them, against transformers' model with the start's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_upcycle import DENSE_SIZES, RELATIVES, declared
from transformers import AutoConfig

from moedisco_ray.core.config import FAMILIES, Architecture, Model
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import config_values, hf_config
from moedisco_ray.models.dense import upcycled_config
from moedisco_ray.models.hf import skeleton
from moedisco_ray.plan import count_parameters

VOCAB = 96
SIZES = ("num_key_value_heads", "head_dim", "tie_word_embeddings", "shared_expert_intermediate_size")
"""Configuration fields that a `config.json` may leave out, besides those of the family."""
NOT_BUILT = {("dots1", "n_shared_experts")}
"""Fields without which transformers cannot make the model."""
ROLES = (
    ("shared_expert", "shared_expert"),
    ("experts", "experts"),
    ("mlp.gate.", "router"),
    (".router.", "router"),
    ("mlp.", "dense"),
    ("norm", "norms"),
    ("_attn", "attention"),
    ("embed", "embedding"),
    ("lm_head", "head"),
)


def check_count(model: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Compare the parameters that a plan counts for a `model` section with those of a `config.json`, by role."""
    section = with_start(Model.model_validate(model))
    assert Model.model_validate_json(section.model_dump_json()) == section, "a run records the sizes of its start"
    theirs = dict.fromkeys((role for _, role in ROLES), 0)
    for name, tensor in skeleton(values).named_parameters():
        if tensor.requires_grad:
            theirs[next(role for part, role in ROLES if part in name)] += tensor.numel()
    ours = count_parameters(section.family_name, section.architecture, VOCAB)
    assert {role: getattr(ours, role) for role in theirs} == theirs


@pytest.mark.parametrize(("family", "kind"), RELATIVES)
def test_an_upcycled_model_has_the_planned_parameters(tmp_path: Path, family: str, kind: str) -> None:
    known = AutoConfig.for_model(kind).to_dict()
    heads = {"head_dim": 12} if DECLARATIONS[family].attention.own_head_dim else {}
    changes: list[dict[str, Any]] = [{}, {"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}]
    for number, change in enumerate(change for change in changes if change.keys() <= known.keys()):
        start = tmp_path / str(number)
        sizes = declared(kind, {**DENSE_SIZES, "vocab_size": VOCAB, **heads, **change})
        AutoConfig.for_model(kind, **sizes).save_pretrained(start)
        for split in (1, 2):
            init = {"upcycle": str(start), "num_experts": 4, "num_experts_per_tok": 4, "split": split}
            check_count({"family": family, "init": init}, upcycled_config(start, family, 4, 4, split))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_has_the_planned_parameters_whatever_its_configuration_leaves_out(
    tmp_path: Path, family: str
) -> None:
    page = DECLARATIONS[family]
    sizes = Architecture(
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=32,
        moe_intermediate_size=24,
        num_experts=8,
        num_key_value_heads=None if page.attention.latent else 2,
        fields={} if page.recurrence is None else {"linear_num_value_heads": 32},
    )
    values = config_values(hf_config(family, sizes, VOCAB, 64, 0))
    for left_out in (None, *page.fields, *SIZES):
        if (family, left_out) in NOT_BUILT or left_out == page.expert_size_field:
            continue
        kept = {name: value for name, value in values.items() if name != left_out}
        (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        check_count({"init": {"checkpoint": str(tmp_path)}}, kept)
