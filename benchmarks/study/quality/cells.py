"""Base configuration of each cell of the grid, CORPUS/FAMILY/START: the default preset's recipe at a size for CPUs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from benchmarks.study.compare.arms import OWN_DECAY, Arm
from benchmarks.study.quality.corpus_files import sources, unseen_sources
from moedisco_ray.core.config import FAMILIES, RunConfig, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

STARTS: Mapping[str, tuple[str, ...]] = {"random": (), "seed": ("model.init.upcycle",)}
"""Starts of a cell, and the settings that select each start."""
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "moe_intermediate_size": 256,
    "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": True}
RECIPES: Mapping[str, dict[str, Any]] = {
    "random": {"lr": 2e-3, "batch_tokens": 256, "micro_batch": None},
    "seed": {"lr": 4e-3, "batch_tokens": 512, "micro_batch": None}}
"""Best batch size and learning rate of the default by start, among those in tried.json; its fine-tune uses half of this rate."""
_UPCYCLE = {"lr": 4e-3, "batch_tokens": 512}
OWN_RECIPES: Mapping[tuple[str, str], Mapping[str, dict[str, Any]]] = {
    ("qwen3_moe", "random"): {"joint": {"lr": 4e-3, "batch_tokens": 512}, "upcycle": _UPCYCLE},
    ("qwen3_moe", "seed"): {"joint": {"lr": 6e-3, "batch_tokens": 1024}, "upcycle": _UPCYCLE},
    ("mixtral", "random"): {"joint": {"lr": 2e-3, "batch_tokens": 512}, "upcycle": _UPCYCLE},
    ("mixtral", "seed"): {"joint": {"lr": 6e-3, "batch_tokens": 1024}, "upcycle": _UPCYCLE}}
"""Best batch size and learning rate of the baselines by family and start, among those in tried.json. `mixtral` needs lower rates,
because it does not normalise queries and keys."""
HELD_OUT = 40_000
"""Validation tokens for a finished model: about a hundred documents, a dozen of each domain."""
START_TOKENS = 250_000
"""Training tokens of the common dense model from which the arms of a `seed` cell start; no arm pays for it. Like a published
model, it consists of weights without optimizer state. The recipe decides how to continue: joint training upcycles it at once, the
default first trains it further as its seed; without that, the default was much worse (tried.json)."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the grid: corpus, model family and start.

    Attributes:
        corpus: `embedded`, or a folder of text files, one per domain, with blank lines between documents.
        family: Model family.
        start: `random` initialisation, or a common dense `seed` model from which the arms build their MoE.
    """

    corpus: str
    family: str
    start: str

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = text.split("/")
        if len(parts) != 3 or parts[1] not in FAMILIES or parts[2] not in STARTS:
            choices = f"FAMILY one of {', '.join(FAMILIES)}; START one of {', '.join(STARTS)}"
            raise SystemExit(f"--cell {text!r} must read CORPUS/FAMILY/START; {choices}")
        return cls(*parts)

    def __str__(self) -> str:
        return f"{self.corpus}/{self.family}/{self.start}"

    @property
    def slug(self) -> str:
        return str(self).replace("/", "-")


def own_arms(arms: Mapping[str, Arm], family: str, start: str) -> dict[str, Arm]:
    """The arms, with their own batch size and learning rate for those that have one."""
    joint, upcycle = (OWN_RECIPES[family, start][name] for name in ("joint", "upcycle"))
    whole = {f"finetune.optimizer.{name}": value for name, value in joint.items()}
    phased = {f"{section}.optimizer.{name}": value for section in ("submodels", "finetune") for name, value in upcycle.items()}
    phased["finetune.optimizer.lr"] = upcycle["lr"] / 2
    own = {"joint": whole, "joint-low": whole, "long-finetune": whole, "upcycle": phased}
    return {name: dataclasses.replace(arm, settings={**arm.settings, **own.get(name, {})}) for name, arm in arms.items()}


def base_config(cell: Cell, seed: int, tokens: int, corpora: Path | None, work: Path) -> RunConfig:
    """The default preset at the cell's size; for a `seed` cell, the common start model is trained first, once."""
    raw = yaml.safe_load(preset_text("default"))
    raw |= {
        "name": cell.slug, "seed": seed, "output": str(work),
        "corpus": {"sources": sources(cell.corpus, corpora), "validation_fraction": 0.05, "sequence_length": 128},
        "tokenizer": {"train_vocab_size": 2048},
        "model": {"family": cell.family, "config": SIZES},
        "evaluation": {
            **raw["evaluation"], "max_tokens": HELD_OUT, "every_tokens": tokens // 8, "prompts": [],
            "stages": False, "sources": unseen_sources(cell.corpus, corpora)},
        "checkpoint": {"every": 100_000},
    }
    raw["tokens"]["total"] = tokens
    raw["clusters"] |= {"count": 4, "restarts": 2, "sample": 2000}
    raw["merge"]["calibration_tokens"] = 4096
    raw["submodels"]["sync_every"] = 8    # of some dozens of steps, in proportion to the preset's 25 of a hundred
    for pool in raw["pools"].values():
        pool["gpu"] = 0
    raw["pools"]["high_memory"]["workers"] = 1
    if cell.start == "random":
        return check_config(_with_recipe(raw, "random"))
    return check_config(_with_recipe(_from_seed(raw, work), "seed"))


def _with_recipe(raw: dict[str, Any], start: str) -> dict[str, Any]:
    """Set the start's recipe; the fine-tune gets half of its learning rate.

    Optimizer and schedules are those with which these cells were tuned and measured; cells of `study.grid` have the preset's.
    """
    rates = {"submodels": 1.0, "finetune": 0.5}
    return raw | {
        section: {**raw[section], "optimizer": {
            **raw[section]["optimizer"], "name": "adamw", **OWN_DECAY[section], **RECIPES[start],
            "lr": RECIPES[start]["lr"] * share}}
        for section, share in rates.items()}


def _from_seed(raw: dict[str, Any], work: Path) -> dict[str, Any]:
    # All steps of this run but the last train the common dense model, from random weights.
    total = START_TOKENS + RECIPES["random"]["batch_tokens"]
    common = check_config(_with_recipe(raw, "random") | {
        "name": "start", "output": str(work),
        "tokens": {"total": total, "seed_share": START_TOKENS / total, "finetune_share": 1 - START_TOKENS / total},
        "evaluation": {**raw["evaluation"], "every_tokens": None}})
    directory = pipeline.run(common, backend=LocalBackend())
    return raw | {
        "tokenizer": {"path": str(directory / "corpus" / "tokenizer")},
        "model": {"family": raw["model"]["family"], "init": {
            "upcycle": str(directory / "seed"), **{key: SIZES[key] for key in ("num_experts", "num_experts_per_tok")}}}}
