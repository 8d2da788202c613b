"""The default recipe next to other ways to train published shapes on sets of machines, and plans of published runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from docs.plans import CHECKPOINTS
from moedisco_ray.core.config import Architecture, FamilyName, RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.bill import Line
from moedisco_ray.core.records.ways import NOT_COMPARED, without_needless_rounding
from moedisco_ray.plan import GIB, Alternative, Plan, build_plan
from moedisco_ray.plan.files import StageStorage

_L4 = {"gpu": 1, "card": "L4", "price_per_hour": 0.33, "max_workers": 8}
_H100 = {"gpu": 1, "card": "H100", "price_per_hour": 2.60}
_NODE = {"gpus_per_node": 8, "network": 3200}
MACHINES: Mapping[str, Mapping[str, Any]] = {
    "4 x RTX 4090 in two boxes, 1 Gbit/s": {
        "low_memory": {
            "gpu": 1,
            "card": "RTX 4090",
            "price_per_hour": 0.35,
            "max_workers": 4,
            "gpus_per_node": 2,
            "network": 1,
        },
        "high_memory": {"gpu": 0, "price_per_hour": 0},
    },
    "8 spot L4": {"low_memory": _L4, "high_memory": {"gpu": 0, "price_per_hour": 0}},
    "1 x H100": {"low_memory": _H100 | {"max_workers": 1}, "high_memory": _H100},
    "8 x H100 in one node": {
        "low_memory": _H100 | _NODE | {"max_workers": 8},
        "high_memory": _H100 | _NODE | {"workers": 8},
    },
    "8 spot L4 and 8 x H100 in one node": {"low_memory": _L4, "high_memory": _H100 | _NODE | {"workers": 8}},
}
"""Pools of the sets of machines, by name. Where there are no large cards, the low-memory pool fine-tunes."""
BOTH = "8 spot L4 and 8 x H100 in one node"
TOKENS = 1_000_000_000
POOLS = ("low_memory", "high_memory")
HEAD = ["machines", "checkpoint", "way", "hours", "dollars", "GiB per card", "limit"]


def config_on(machines: str, checkpoint: str | None = None) -> RunConfig:
    """The default preset's shares of tokens on a set of machines, which `recipe: auto` compares with the other ways.

    Args:
        machines: Name of the set.
        checkpoint: Published shape, trained on a billion tokens; None: the preset's own model and tokens.
    """
    raw = yaml.safe_load(preset_text("default"))
    pools = MACHINES[machines]
    raw["recipe"] = None
    raw["pools"] = {name: dict(pool) for name, pool in pools.items()}
    raw["finetune"]["pool"] = "high_memory" if pools["high_memory"]["gpu"] else "low_memory"
    if checkpoint is not None:
        family, vocabulary, sizes = CHECKPOINTS[checkpoint]
        raw["model"] = {
            "family": family,
            "config": sizes.model_dump(exclude_unset=True) | {"vocab_size": vocabulary},
            "init": "random",
        }
        raw["tokens"]["total"] = TOKENS
    return check_config(raw)


def plan_on(machines: str, checkpoint: str | None = None) -> Plan:
    """The plan of the default recipe on a set of machines."""
    return build_plan(config_on(machines, checkpoint))


def rows() -> Iterator[list[str]]:
    """A row per set of machines, published shape and way; the cheapest way that fits is in bold."""
    for machines in MACHINES:
        for checkpoint in CHECKPOINTS:
            for row in way_rows(plan_on(machines, checkpoint)):
                yield [machines, checkpoint, *row]


def way_rows(plan: Plan) -> Iterator[list[str]]:
    """A row per way of a plan; in bold the cheapest one that fits, of those that train the whole model as exactly."""
    priced = without_needless_rounding([way for way in plan.alternatives if way.way not in NOT_COMPARED])
    best = min(priced, key=lambda way: way.dollars or 0.0, default=None)
    for way in plan.alternatives:
        yield [f"**{way.name}**" if way is best else way.name, *_figures(way)]


def _figures(way: Alternative) -> list[str]:
    fits = way.limit is None
    return [
        f"{way.seconds / 3600:,.1f}" if fits and way.seconds is not None else "",
        f"{way.dollars:,.2f}" if fits and way.dollars is not None else "",
        "" if way.memory_gb is None else f"{way.memory_gb:.1f}",
        way.limit or "",
    ]


STORAGE_HEAD = [
    "checkpoint",
    "training",
    "hours",
    "hours of small cards",
    "hours of large cards",
    "GB in the run directory",
    "GB of checkpoints at a time",
    "GB of disk per worker",
    "GB of memory per worker",
    "GB through storage",
    "TB between cards",
]
STAGE_HEAD = [
    "stage",
    "pool",
    "hours",
    "GB in the run directory",
    "GB of checkpoints at a time",
    "GB of disk per worker",
    "GB of memory per worker",
    "GB through storage",
    "TB between cards",
]
EXAMPLE = "Qwen1.5-MoE-A2.7B"
"""Checkpoint whose stages the page shows one by one."""


def storage_rows() -> Iterator[list[str]]:
    """Two rows per checkpoint: the run, and joint training of the whole model on as many tokens."""
    for name in CHECKPOINTS:
        plan = plan_on(BOTH, name)
        joint_ways = [way for way in plan.alternatives if way.way == "joint_high_memory" and way.seconds is not None]
        peak = max(each.checkpoints for each in plan.storage)
        yield [
            name,
            "run",
            *_worked(plan),
            _gb(sum(each.stored for each in plan.storage)),
            _gb(peak),
            _gb(max(map(_disk, plan.storage))),
            _gb(max(each.worker_memory for each in plan.storage)),
            _gb(sum(each.moved for each in plan.storage)),
            _gb(sum(each.exchanged for each in plan.storage) / 1024),
        ]
        hours = joint_ways[-1].seconds if joint_ways else None
        large = "" if hours is None else _hours(hours * joint_ways[-1].workers)
        yield [
            name,
            "joint",
            "" if hours is None else _hours(hours),
            "0.0",
            large,
            *_sizes(plan.joint_training_storage),
        ]


def _worked(plan: Plan) -> list[str]:
    """Hours of a run, and of the workers of each pool; empty if it does not fit."""
    if not plan.bill.lines:
        return [""] * (1 + len(POOLS))
    held = (_hours(_worker_seconds(plan.bill.lines, pool)) for pool in POOLS)
    return [_hours(sum(each.seconds or 0 for each in plan.estimates)), *held]


def _worker_seconds(lines: Iterable[Line], pool: str) -> float:
    return sum(each.worker_seconds or 0 for each in lines if each.pool == pool)


def stage_rows() -> Iterator[list[str]]:
    """A row per stage of the example's run."""
    plan = plan_on(BOTH, EXAMPLE)
    stored = {each.stage: each for each in plan.storage}
    for each in plan.estimates:
        if each.stage in stored:
            hours = "" if each.seconds is None else _hours(each.seconds)
            yield [each.stage, stored[each.stage].pool.replace("_", "-"), hours, *_sizes(stored[each.stage])]


def _sizes(stage: StageStorage) -> list[str]:
    sizes = (stage.stored, stage.checkpoints, _disk(stage), stage.worker_memory, stage.moved, stage.exchanged / 1024)
    return [_gb(size) for size in sizes]


def _disk(stage: StageStorage) -> int:
    return stage.worker_disk + stage.node_disk // max(1, stage.workers)


def _gb(size: float) -> str:
    return f"{size / GIB:,.1f}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f}"


@dataclasses.dataclass(frozen=True)
class Published:
    """A published training, to plan the same model, batch and cards with the layout that a gang would take.

    Attributes:
        name: Model.
        source: Publication.
        tokens_per_second: Published tokens per second and card.
        card: Card.
        cards: Number of cards, in nodes of 8.
        batch: Sequences per step.
        micro_batch: Sequences in one forward pass of a card.
        length: Tokens per sequence.
        family: Family of the model.
        vocabulary: Entries of the vocabulary.
        sizes: Sizes of the model.
        why: Why the plan is far from the figure; empty if it is not.
    """

    name: str
    source: str
    tokens_per_second: float
    card: str
    cards: int
    batch: int
    micro_batch: int
    length: int
    family: FamilyName
    vocabulary: int
    sizes: Architecture
    why: str = ""

    @property
    def planned(self) -> float:
        """Planned tokens per second and card."""
        recipe = {"batch_tokens": self.batch * self.length, "micro_batch": self.micro_batch, "precision": "bf16"}
        config = check_config(
            {
                "name": "published",
                "corpus": {"sources": [{"path": "embedded"}], "sequence_length": self.length},
                "model": {
                    "family": self.family,
                    "config": self.sizes.model_dump(exclude_unset=True) | {"vocab_size": self.vocabulary},
                },
                "tokens": {"total": 10**10, "seed_share": 0, "finetune_share": 1},
                "clusters": {"count": 1, "vectors": "tfidf_svd"},
                "submodels": {"optimizer": recipe},
                "finetune": {"optimizer": recipe},
                "pools": {
                    "high_memory": {
                        "gpu": 1,
                        "card": self.card,
                        "workers": self.cards,
                        "gpus_per_node": 8,
                        "network": 3200,
                    }
                },
            }
        )
        [stage] = build_plan(config).stages
        return stage.cost.tokens / (3600 * stage.cost.worker_hours)


_MPT_1B = Architecture(
    hidden_size=2048,
    num_hidden_layers=24,
    num_attention_heads=16,
    moe_intermediate_size=5464,
    num_experts=1,
    num_experts_per_tok=1,
)
"""MPT-1B, whose MLP of two matrices is as large as one of three with this width."""
_LLAMA_8B = Architecture(
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    moe_intermediate_size=14_336,
    num_experts=1,
    num_experts_per_tok=1,
)
_GPT_OSS_120B = CHECKPOINTS["gpt-oss-20b"][2].model_copy(update={"num_hidden_layers": 36, "num_experts": 128})
_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
_TITAN = "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
_AUTOMODEL = "NVIDIA-NeMo/Automodel, docs/performance-summary.md, 2025-10"
_BRIDGE = "NVIDIA Megatron Bridge, performance summary"
_FUSED = "Transformer Engine, DeepEP{} and a balanced router, which a run here does not have"
_DENSE_8B: tuple[FamilyName, int, Architecture] = ("mixtral", 128_256, _LLAMA_8B)
PUBLISHED = (
    Published(
        "OLMoE-1B-7B", "arXiv 2409.02060, section 4.1", 23_600, "H100", 256, 1024, 4, 4096, *CHECKPOINTS["OLMoE-1B-7B"]
    ),
    Published(
        "Qwen3-30B-A3B",
        "NVIDIA Megatron Bridge, performance summary, 25.09, with dropped tokens",
        10_494,
        "H100",
        16,
        512,
        2,
        4096,
        *CHECKPOINTS["Qwen3-30B-A3B"],
    ),
    Published(
        "Mixtral-8x7B",
        "NVIDIA/Megatron-LM issue 756: 230 TFLOP/s per card, of 79.8 GFLOP per token with causal attention",
        2_882,
        "H100",
        16,
        256,
        1,
        4096,
        *CHECKPOINTS["Mixtral-8x7B"],
    ),
    Published(
        "DeepSeek-V2-Lite",
        "pytorch/torchtitan issue 1789, mean of its four lines: DeepSeek-V3 with these sizes",
        11_545,
        "H100",
        8,
        32,
        4,
        4096,
        *CHECKPOINTS["DeepSeek-V2-Lite"],
    ),
    Published("Llama 3.1 8B (dense)", f"{_TITAN}, table 1, FSDP", 5_762, "H100", 8, 16, 2, 8192, *_DENSE_8B),
    Published(
        "Llama 3.1 8B (dense)", f"{_TITAN}, table 3, FSDP, compiled", 6_514, "H100", 128, 256, 2, 8192, *_DENSE_8B
    ),
    Published("MPT-1B (dense)", _FOUNDRY, 45_455, "H100", 8, 112, 14, 2048, "qwen3_moe", 50_368, _MPT_1B),
    Published("MPT-1B (dense)", _FOUNDRY, 20_513, "A100-80GB", 8, 448, 14, 2048, "qwen3_moe", 50_368, _MPT_1B),
)
"""Published trainings from which plans differ by less than a fifth."""
FAR = (
    Published(
        "Qwen3-30B-A3B",
        _AUTOMODEL,
        12_040,
        "H100",
        8,
        512,
        4,
        4096,
        *CHECKPOINTS["Qwen3-30B-A3B"],
        why=_FUSED.format(""),
    ),
    Published(
        "Qwen3-30B-A3B",
        f"{_BRIDGE}, 25.11",
        5_275,
        "H100",
        16,
        512,
        2,
        4096,
        *CHECKPOINTS["Qwen3-30B-A3B"],
        why="a pipeline of two stages in FP8; with dropped tokens, 25.09 has twice as many",
    ),
    Published(
        "gpt-oss-20b",
        _AUTOMODEL,
        13_058,
        "H100",
        8,
        256,
        2,
        4096,
        *CHECKPOINTS["gpt-oss-20b"],
        why=_FUSED.format(", FlexAttention") + "; a plan recomputes activations, because attention sinks keep scores",
    ),
    Published(
        "gpt-oss-120B",
        f"{_BRIDGE}, 26.02",
        5_993,
        "H100",
        64,
        1280,
        1,
        4096,
        *CHECKPOINTS["gpt-oss-20b"][:2],
        _GPT_OSS_120B,
        why="a pipeline between nodes, where a plan shards all weights over the network",
    ),
)
"""Published trainings from which plans differ by more than a fifth, with the reason."""
PUBLISHED_HEAD = ["model", "cards", "published tokens/s per card", "planned", "difference", "source"]


def published_rows(trainings: Iterable[Published] = PUBLISHED) -> Iterator[list[str]]:
    """A row per published training."""
    for each in trainings:
        difference = each.planned / each.tokens_per_second - 1
        yield [
            each.name,
            f"{each.cards} x {each.card}",
            f"{each.tokens_per_second:,.0f}",
            f"{each.planned:,.0f}",
            f"{difference:+.0%}",
            each.source,
            *([each.why] if each.why else ()),
        ]
