"""The page with the plans of published checkpoints, from `moedisco_ray.plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moedisco_ray.core.config import Architecture, FamilyName, RunConfig, check_config
from moedisco_ray.plan import Plan, StagePlan, build_plan
from moedisco_ray.plan.memory import GIB

_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
"""Sizes of DeepSeek's latent attention."""
_QWEN_RECURRENT: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "moe_intermediate_size": 512,
    "fields": {
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}
"""Sizes that Qwen3-Next and Qwen3.5-35B-A3B have in common."""
CHECKPOINTS: dict[str, tuple[FamilyName, int, Architecture]] = {
    "OLMoE-1B-7B": (
        "olmoe",
        50_304,
        Architecture(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            moe_intermediate_size=1024,
            num_experts=64,
            num_experts_per_tok=8,
        ),
    ),
    "Qwen1.5-MoE-A2.7B": (
        "qwen2_moe",
        151_936,
        Architecture(
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632,
            num_experts=60,
            num_experts_per_tok=4,
        ),
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        151_936,
        Architecture(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "Mixtral-8x7B": (
        "mixtral",
        32_000,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            moe_intermediate_size=14_336,
            num_experts=8,
            num_experts_per_tok=2,
        ),
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        201_088,
        Architecture(
            hidden_size=2880,
            num_hidden_layers=24,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=64,
            moe_intermediate_size=2880,
            num_experts=32,
            num_experts_per_tok=4,
        ),
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        102_400,
        Architecture(
            hidden_size=2048,
            num_hidden_layers=27,
            num_attention_heads=16,
            moe_intermediate_size=1408,
            num_experts=64,
            num_experts_per_tok=6,
            fields={
                **_LATENT,
                "q_lora_rank": None,
                "intermediate_size": 10_944,
                "first_k_dense_replace": 1,
                "n_shared_experts": 2,
            },
        ),
    ),
}
"""Family, vocabulary and sizes of published checkpoints that the page shows, by name."""
OTHERS: dict[str, tuple[FamilyName, int, Architecture]] = {
    "GLM-4.5-Air": (
        "glm4_moe",
        151_552,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=46,
            num_attention_heads=96,
            num_key_value_heads=8,
            head_dim=128,
            moe_intermediate_size=1408,
            num_experts=128,
            num_experts_per_tok=8,
            fields={"attention_bias": True, "intermediate_size": 10_944, "first_k_dense_replace": 1},
        ),
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        129_280,
        Architecture(
            hidden_size=7168,
            num_hidden_layers=61,
            num_attention_heads=128,
            moe_intermediate_size=2048,
            num_experts=256,
            num_experts_per_tok=8,
            fields={
                **_LATENT,
                "q_lora_rank": 1536,
                "intermediate_size": 18_432,
                "first_k_dense_replace": 3,
                "n_group": 8,
                "topk_group": 4,
                "routed_scaling_factor": 2.5,
            },
        ),
    ),
    # The defaults of transformers' configuration, which are those of this checkpoint; so too ERNIE 4.5 and Solar Open.
    "FlexOlmo-7x7B-1T": (
        "flex_olmo",
        100_352,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            moe_intermediate_size=11_008,
            num_experts=7,
            num_experts_per_tok=5,
        ),
    ),
    # config.json of rednote-hilab/dots.llm1.base.
    "dots.llm1": (
        "dots1",
        152_064,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=62,
            num_attention_heads=32,
            moe_intermediate_size=1408,
            num_experts=128,
            num_experts_per_tok=6,
            fields={
                "intermediate_size": 10_944,
                "first_k_dense_replace": 1,
                "n_shared_experts": 2,
                "routed_scaling_factor": 2.5,
            },
        ),
    ),
    "Solar-Open-100B": (
        "solar_open",
        196_608,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=48,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            moe_intermediate_size=1280,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "ERNIE-4.5-21B-A3B": (
        "ernie4_5_moe",
        103_424,
        Architecture(
            hidden_size=2560,
            num_hidden_layers=28,
            num_attention_heads=20,
            num_key_value_heads=4,
            moe_intermediate_size=1536,
            num_experts=64,
            num_experts_per_tok=6,
            tie_word_embeddings=True,
            fields={"intermediate_size": 12_288, "moe_layer_start_index": 1, "moe_num_shared_experts": 2},
        ),
    ),
    # config.json of ibm-granite/granite-3.0-3b-a800m-instruct.
    "Granite-3.0-3B-A800M": (
        "granitemoe",
        49_155,
        Architecture(
            hidden_size=1536,
            num_hidden_layers=32,
            num_attention_heads=24,
            num_key_value_heads=8,
            moe_intermediate_size=512,
            num_experts=40,
            num_experts_per_tok=8,
            tie_word_embeddings=True,
        ),
    ),
    # The defaults of transformers' configuration, and the biases that config.json of microsoft/Phi-3.5-MoE-instruct
    # switches on.
    "Phi-3.5-MoE": (
        "phimoe",
        32_064,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            moe_intermediate_size=6400,
            num_experts=16,
            num_experts_per_tok=2,
            fields={"attention_bias": True, "lm_head_bias": True},
        ),
    ),
    # The defaults of transformers' configurations, which are those of these checkpoints.
    "Qwen3-Next-80B-A3B": (
        "qwen3_next",
        151_936,
        Architecture(num_hidden_layers=48, num_experts=512, num_experts_per_tok=10, **_QWEN_RECURRENT),
    ),
    "Qwen3.5-35B-A3B": (
        "qwen3_5_moe_text",
        248_320,
        Architecture(num_hidden_layers=40, num_experts=256, num_experts_per_tok=8, **_QWEN_RECURRENT),
    ),
    "LLaMA-MoE-v1-3.5B-4/16": (
        "llama_moe",
        32_000,
        Architecture(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            moe_intermediate_size=688,
            num_experts=16,
            num_experts_per_tok=4,
            fields={"score_scale_factor": 4.0},
        ),
    ),
}
"""Checkpoints that only `make test-fake` plans and measures."""
HEAD = [
    "checkpoint",
    "stage",
    "models",
    "parameters of each",
    "settings",
    "times as long",
    "GiB per card",
    "of",
    "GiB in the machine",
]
INFERENCE_HEAD = ["checkpoint", "stage", "GB of weights", "GB of states and activations", "GiB per card", "of"]
_GROUP = 4
"""Experts per sub-model, where the checkpoint has many."""
_CHEAP, _LARGE = 24, 80
BATCH_TOKENS = 32_768
_CARDS = (1, 8)
"""Numbers of large cards for the fine-tune."""


def rows() -> Iterator[list[str]]:
    """A row per checkpoint, stage and number of large cards."""
    for name, (_, _, sizes) in CHECKPOINTS.items():
        group = f"{_clusters(sizes)} of {sizes.num_experts // _clusters(sizes)} experts"
        yield _row(name, planned(name, "submodels"), group, _CHEAP)
        for cards in _CARDS:
            yield _row(name, planned(name, "finetune", cards), f"1 on {cards} card{'s' if cards > 1 else ''}", _LARGE)


def inference_rows() -> Iterator[list[str]]:
    """A row per checkpoint and stage that runs text through the whole model on a large card."""
    for name, (family, vocabulary, sizes) in CHECKPOINTS.items():
        for stage in build_plan(_config(family, vocabulary, sizes, _clusters(sizes), 1)).inference:
            if stage.stage in ("merge", "evaluate"):
                memory = (stage.memory.weights, stage.memory.activations, stage.memory.total)
                yield [name, stage.stage, *(f"{size / GIB:.1f}" for size in memory), f"{stage.pool_gb:g}"]


def _plan_on(checkpoint: str, cards: int) -> Plan:
    family, vocabulary, sizes = CHECKPOINTS[checkpoint]
    return build_plan(_config(family, vocabulary, sizes, _clusters(sizes), cards))


def planned(checkpoint: str, stage: str, cards: int = 1) -> StagePlan:
    """Plan of a stage of a published checkpoint.

    Args:
        checkpoint: Name of the checkpoint.
        stage: `submodels`, each on one card of 24 GB, or `finetune`, on cards of 80 GB.
        cards: Number of large cards.
    """
    return next(each for each in _plan_on(checkpoint, cards).stages if each.stage == stage)


def _clusters(sizes: Architecture) -> int:
    return max(sizes.num_experts // _GROUP, min(sizes.num_experts, 8))


def _row(name: str, stage: StagePlan, models: str, card: int) -> list[str]:
    choice, memory = stage.choice, stage.memory
    changed = () if choice is None else tuple(setting.partition("optimizer.")[2] for setting in choice.settings)
    settings, size = ", ".join(changed) or "default", f"{memory.total / GIB:.1f}"
    if stage.remedy is not None:
        settings, size = "none fit", ""
    times = "" if stage.remedy is not None else f"{1.0 if choice is None else choice.cost:.1f}"
    offloaded = f"{memory.offloaded / GIB:.0f}" if memory.offloaded else ""
    return [
        name,
        stage.stage,
        models,
        f"{stage.parameters.total / 1e9:.1f} B",
        settings,
        times,
        size,
        str(card),
        offloaded,
    ]


def _config(family: FamilyName, vocabulary: int, sizes: Architecture, clusters: int, cards: int) -> RunConfig:
    optimizer = {"batch_tokens": BATCH_TOKENS}
    raw: dict[str, Any] = {
        "name": "plan",
        "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 1024},
        "model": {"family": family, "config": sizes.model_dump(exclude_unset=True) | {"vocab_size": vocabulary}},
        "tokens": {"total": 1_000_000_000},
        "clusters": {"count": clusters},
        "submodels": {"optimizer": optimizer},
        "finetune": {"optimizer": optimizer},
        "pools": {
            "low_memory": {"gpu": 1, "memory_gb": _CHEAP, "max_workers": clusters},
            "high_memory": {"gpu": 1, "memory_gb": _LARGE, "workers": cards},
        },
    }
    return check_config(raw)
