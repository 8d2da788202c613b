"""The page with the plans of published checkpoints, from `moedisco_ray.plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moedisco_ray.core.config import Architecture, FamilyName, RunConfig, check_config
from moedisco_ray.plan import StagePlan, build_plan
from moedisco_ray.plan.memory import GIB

CHECKPOINTS: dict[str, tuple[FamilyName, int, Architecture]] = {
    "OLMoE-1B-7B": ("olmoe", 50_304, Architecture(
        hidden_size=2048, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, moe_intermediate_size=1024,
        num_experts=64, num_experts_per_tok=8)),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", 151_936, Architecture(
        hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4)),
    "Qwen3-30B-A3B": ("qwen3_moe", 151_936, Architecture(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)),
    "Mixtral-8x7B": ("mixtral", 32_000, Architecture(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, moe_intermediate_size=14_336,
        num_experts=8, num_experts_per_tok=2)),
}
"""Family, vocabulary and sizes of published checkpoints, by name."""
HEAD = ["checkpoint", "stage", "models", "parameters of each", "settings that fit", "GB per card", "of"]
_GROUP = 4
"""Experts per sub-model, where the checkpoint has many."""
_CHEAP, _LARGE = 24, 80
_CARDS = (1, 8, 16)
"""Numbers of large cards that are tried for the fine-tune."""


def rows() -> Iterator[list[str]]:
    """A row per checkpoint and stage."""
    for name, (family, vocabulary, sizes) in CHECKPOINTS.items():
        clusters = max(sizes.num_experts // _GROUP, min(sizes.num_experts, 8))
        config = _config(family, vocabulary, sizes, clusters, 1)
        submodels = next(stage for stage in build_plan(config).stages if stage.stage == "submodels")
        yield _row(name, submodels, f"{clusters} of {sizes.num_experts // clusters} experts", _CHEAP)
        stage, cards = _finetune(family, vocabulary, sizes, clusters)
        yield _row(name, stage, f"1 on {cards} card{'s' if cards > 1 else ''}", _LARGE)


def _finetune(family: FamilyName, vocabulary: int, sizes: Architecture, clusters: int) -> tuple[StagePlan, int]:
    """The fine-tune on the smallest number of cards on which it fits, else on the largest number."""
    for cards in _CARDS:
        plan = build_plan(_config(family, vocabulary, sizes, clusters, cards))
        stage = next(stage for stage in plan.stages if stage.stage == "finetune")
        if stage.remedy is None or (stage.remedy.fits and not any("pools" in setting for setting in stage.remedy.settings)):
            break
    return stage, cards


def _row(name: str, stage: StagePlan, models: str, card: int) -> list[str]:
    remedy = stage.remedy
    settings = ", ".join(setting.partition("optimizer.")[2] or setting for setting in remedy.settings) if remedy else "default"
    size = stage.memory.total / GIB if remedy is None else remedy.memory_gb
    fits = "" if remedy is None or remedy.fits else " (does not fit)"
    return [name, stage.stage, models, f"{stage.parameters.total / 1e9:.1f} B", settings, f"{size:.1f}{fits}", str(card)]


def _config(family: FamilyName, vocabulary: int, sizes: Architecture, clusters: int, cards: int) -> RunConfig:
    optimizer = {"batch_tokens": 32_768}
    raw: dict[str, Any] = {
        "name": "plan",
        "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 1024},
        "model": {"family": family, "config": sizes.model_dump() | {"vocab_size": vocabulary}},
        "tokens": {"total": 1_000_000_000},
        "clusters": {"count": clusters},
        "submodels": {"optimizer": optimizer},
        "finetune": {"optimizer": optimizer},
        "pools": {
            "low_memory": {"gpu": 1, "memory_gb": _CHEAP, "max_workers": clusters},
            "high_memory": {"gpu": 1, "memory_gb": _LARGE, "workers": cards}},
    }
    return check_config(raw)
