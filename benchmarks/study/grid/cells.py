"""The cells of the grid and their base configurations, on a CPU and on one large card.

Rates, batches and schedules are tuned on one corpus and one seed. Cells are reported on other corpora and other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.study.grid.find_corpus import EMBEDDED, known_corpora, sources, unseen_sources
from moedisco_ray.core.config import FamilyName, RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.summaries import Record
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

ScaleName = Literal["cpu", "small", "gpu", "smoke"]
Start = Literal["random", "seed"]
"""`random` weights, or a common dense `seed` model from which every arm builds its MoE."""
STARTS: tuple[Start, ...] = ("random", "seed")
FAMILIES: tuple[FamilyName, ...] = ("qwen3_moe", "mixtral")
SHAPES: tuple[tuple[int, int], ...] = ((16, 2), (8, 2), (32, 2), (4, 2))
"""Experts and top-k, most important first: 12.5, 25, 6 and 50 % of the experts are active."""
BUDGETS = (1, 4, 16)
"""Multiples of the scale's smallest budget."""
TUNING_CORPUS = "small8"
"""The corpus on which arms are tuned; no cell is reported on it."""
TUNING_SEED = 7
"""The seed with which arms are tuned; no cell is reported with it."""
REPORT_SEEDS = (0, 1, 2)
START_SHARE = 6
"""The common dense model of a `seed` cell trains on 1 / 6 of the smallest budget, and its rate falls to a tenth; no arm
pays."""


class Scale(Record):
    """Sizes of the models and trainings on one kind of machine."""

    name: ScaleName
    model: Mapping[str, int | bool]
    """Sizes of the model, without experts and top-k."""
    tokens: int
    """Training tokens of the smallest budget."""
    sequence_length: int
    batch_tokens: int
    micro_batch: int | None
    lr: float
    """Learning rate before tuning."""
    vocab_size: int
    held_out: int
    """Validation tokens for a finished model."""
    calibration_tokens: int
    sync_every: int


_COMMON = {"norm_topk_prob": True, "tie_word_embeddings": True}
CPU = Scale(
    name="cpu",
    tokens=1_500_000,
    sequence_length=128,
    batch_tokens=1024,
    micro_batch=None,
    lr=4e-3,
    vocab_size=2048,
    held_out=40_000,
    calibration_tokens=4096,
    sync_every=16,
    model={
        **_COMMON,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 128,
    },
)
"""0.7 of 2.8 million parameters are active with 16 experts; the smallest budget has 1.5 million tokens."""
SMALL = CPU.model_copy(
    update={
        "name": "small",
        "tokens": 1_150_000,
        "lr": 8e-3,
        "model": {**CPU.model, "hidden_size": 64, "num_hidden_layers": 2, "moe_intermediate_size": 64},
    }
)
"""0.2 of 0.55 million parameters are active with 16 experts. The middle budget has as many tokens per parameter as the
largest one of `CPU`, in a twentieth of its time, so that all arms and seeds can be measured there."""
GPU = Scale(
    name="gpu",
    tokens=400_000_000,
    sequence_length=1024,
    batch_tokens=65_536,
    micro_batch=16,
    lr=1e-3,
    vocab_size=16_384,
    held_out=1_000_000,
    calibration_tokens=65_536,
    sync_every=25,
    model={
        **_COMMON,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 512,
    },
)
"""Three arms are planned to take 45 minutes of one large card; this was not measured."""
SMOKE = Scale(
    name="smoke",
    tokens=160 * 32,
    sequence_length=32,
    batch_tokens=32,
    micro_batch=None,
    lr=4e-3,
    vocab_size=400,
    held_out=2000,
    calibration_tokens=512,
    sync_every=2,
    model={
        **_COMMON,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 32,
    },
)
"""160 steps of a tiny model, to test the grid itself. In a slice for tuning, each sub-model still has a batch of twice
the size."""
SCALES: Mapping[str, Scale] = {scale.name: scale for scale in (CPU, SMALL, GPU, SMOKE)}
GPU_SHAPE = (32, 4)
"""Experts and top-k of the cell on a GPU."""


class Cell(Record):
    """One cell of the grid."""

    corpus: str
    """`embedded`, or a folder of text files, one per domain, with blank lines between documents."""
    family: FamilyName
    start: Start
    experts: int
    top_k: int
    budget: int
    """Training tokens as a multiple of the scale's smallest budget."""
    scale: ScaleName = "cpu"

    @property
    def active_share(self) -> float:
        """Share of the experts that each token uses."""
        return self.top_k / self.experts

    @property
    def groups(self) -> int:
        """Number of sub-models: two, each with half of the experts.

        Where cards hold less, `small-groups` shows what it costs.
        """
        return 2

    @property
    def tokens(self) -> int:
        """Training tokens of every arm."""
        return SCALES[self.scale].tokens * self.budget

    @property
    def recipe(self) -> Cell:
        """The cell in which this cell's rates, batches and schedules are tuned."""
        return self.model_copy(update={"corpus": TUNING_CORPUS, "budget": 1})

    def __str__(self) -> str:
        return f"{self.corpus}-{self.family}-{self.start}-{self.experts}x{self.top_k}-x{self.budget}-{self.scale}"


def corpora_folder(repository: Path) -> Path | None:
    """The folder of corpora next to the repository; None if there is none."""
    folder = repository.parent / "shared" / "corpora"
    return folder if folder.is_dir() else None


def report_corpora(folder: Path | None) -> tuple[str, ...]:
    """The corpora on which cells are reported: all but the one for tuning, `embedded` first."""
    return (EMBEDDED, *(name for name in known_corpora(folder) if name != TUNING_CORPUS))


def base_config(cell: Cell, seed: int, corpora: Path | None, work: Path) -> RunConfig:
    """The default preset at the cell's sizes; for a `seed` cell, the common start model is trained first, once.

    Args:
        cell: The cell.
        seed: Seed of the run.
        corpora: Folder of the corpora.
        work: Folder of the run directories.
    """
    scale = SCALES[cell.scale]
    raw = yaml.safe_load(preset_text("default"))
    raw |= {
        "name": str(cell),
        "recipe": None,
        "seed": seed,
        "output": str(work),
        "corpus": {
            "sources": sources(cell.corpus, corpora),
            "validation_fraction": 0.05,
            "sequence_length": scale.sequence_length,
        },
        "tokenizer": {"train_vocab_size": scale.vocab_size},
        "model": {
            "family": cell.family,
            "config": {**scale.model, "num_experts": cell.experts, "num_experts_per_tok": cell.top_k},
        },
        "evaluation": {
            **raw["evaluation"],
            "max_tokens": scale.held_out,
            "every_tokens": cell.tokens,
            "prompts": [],
            "stages": False,
            "sources": unseen_sources(cell.corpus, corpora),
        },
        "checkpoint": {"every": "auto"},
    }
    raw["tokens"]["total"] = cell.tokens
    raw["clusters"]["count"] = cell.groups
    raw["merge"]["calibration_tokens"] = scale.calibration_tokens
    raw["submodels"]["sync_every"] = scale.sync_every
    for section in ("submodels", "finetune"):
        raw[section]["optimizer"] |= {
            "batch_tokens": scale.batch_tokens,
            "micro_batch": scale.micro_batch,
            "lr": scale.lr,
        }
    for pool in raw["pools"].values():
        pool |= {"gpu": int(cell.scale == "gpu"), "card": None}  # at the speeds of the paper, the pools' defaults
    # Models for CPUs are too small to exchange gradients over a network; a card's cell takes what its plan finds.
    raw["pools"]["low_memory"] |= {
        "max_workers": cell.groups,
        "seed_workers": "auto" if cell.scale == "gpu" else cell.groups,
    }
    raw["pools"]["high_memory"]["workers"] = 1
    return check_config(raw if cell.start == "random" else _from_seed(raw, scale, work))


def _from_seed(raw: dict[str, Any], scale: Scale, work: Path) -> dict[str, Any]:
    # All steps of this run but the last train the common dense model, from random weights.
    sizes = raw["model"]["config"]
    trained = scale.tokens // START_SHARE
    total = trained + scale.batch_tokens
    common = check_config(
        raw
        | {
            "name": "start",
            "output": str(work),
            "clusters": {**raw["clusters"], "count": sizes["num_experts"]},
            "tokens": {
                **raw["tokens"],
                "total": total,
                "seed_share": trained / total,
                "finetune_share": 1 - trained / total,
            },
            "evaluation": {**raw["evaluation"], "every_tokens": None},
        }
    )
    directory = pipeline.run(common, backend=LocalBackend())
    return raw | {
        "tokenizer": {"path": str(directory / "corpus" / "tokenizer")},
        "model": {
            "family": raw["model"]["family"],
            "init": {
                "upcycle": str(directory / "seed"),
                **{key: sizes[key] for key in ("num_experts", "num_experts_per_tok")},
            },
        },
    }
