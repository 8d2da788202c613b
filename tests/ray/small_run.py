"""A whole run of seconds: a tiny model on the standard library's own source text."""

from __future__ import annotations

import asyncio
import dataclasses
import email
import functools
import shutil
import tempfile
import time
import unittest
from pathlib import Path
from types import ModuleType
from typing import Any

from moedisco_ray.core.config import RunConfig, check_config, tokenizer_directory
from moedisco_ray.core.config.renamed import read_stored_config
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

DOMAINS: dict[str, ModuleType] = {"asyncio": asyncio, "email": email, "unittest": unittest}
_LIBRARY = Path(str(asyncio.__file__)).parents[1]


def small_config(output: Path, **changes: Any) -> RunConfig:
    """Two sub-models of two experts' worth; sections in `changes` replace single settings."""
    base: dict[str, Any] = {
        "name": "small",
        "output": str(output),
        "corpus": {
            "sources": [
                {
                    "path": f"{Path(str(module.__file__)).parent}/*.py",
                    "name": name,
                    "documents": "paragraph",
                    "format": "text",
                }
                for name, module in DOMAINS.items()
            ],
            "validation_fraction": 0.05,
            "sequence_length": 64,
        },
        "tokenizer": {"train_vocab_size": 600},
        "model": {
            "family": "qwen3_moe",
            "config": {
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "moe_intermediate_size": 128,
                "num_experts": 2,
                "num_experts_per_tok": 2,
            },
        },
        "tokens": {"total": 240_000, "seed_share": 0.0, "finetune_share": 0.65},
        "clusters": {"count": 2, "vectors": "tfidf_svd"},
        "submodels": {"optimizer": {"batch_tokens": 1024, "lr": 2e-3}},
        "finetune": {"optimizer": {"batch_tokens": 1024, "lr": 1e-3, "schedule": "cosine", "warmup": 0.05}},
        "merge": {"calibration_tokens": 4096},
        "pools": {"low_memory": {"max_workers": 2}, "high_memory": {"workers": 1}},
        "checkpoint": {"every": 10},
        "evaluation": {"max_tokens": 8_000},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return check_config(base)


class OneCorpus(LocalBackend):
    """Builds each corpus of the standard library once per process, and copies it into runs that test later stages."""

    def build_corpus(self, config: RunConfig, directory: Path, emit: Emit) -> dict[str, Any]:
        if tokenizer_directory(config) or not all(
            Path(each.path).is_relative_to(_LIBRARY) for each in config.corpus.sources
        ):
            return super().build_corpus(config, directory, emit)
        inputs = (
            config.seed,
            config.corpus.model_dump_json(),
            config.tokenizer.model_dump_json(),
            config.model.architecture.vocab_size,
            config.shared_clusters,
        )
        built = _built(_Corpus(inputs, config))
        for event in built.events:
            emit(dataclasses.replace(event, time=time.time()))
        shutil.copytree(built.directory.name, directory, dirs_exist_ok=True)
        return dict(built.summary)


@dataclasses.dataclass(frozen=True)
class _Corpus:
    """A corpus, which depends on `inputs` alone; others of the same are equal to it."""

    inputs: tuple[object, ...]
    config: RunConfig = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class _Built:
    directory: tempfile.TemporaryDirectory[str]
    summary: dict[str, Any]
    events: list[Event]


@functools.cache
def _built(corpus: _Corpus) -> _Built:
    directory, events = tempfile.TemporaryDirectory(), list[Event]()
    summary = LocalBackend().build_corpus(corpus.config, Path(directory.name), events.append)
    return _Built(directory, summary, events)


def undisturbed_run() -> Path:
    """The small run in one plain process, made once, which other ways of running it are held against.

    To be read, not written.
    """
    return small_config(Path(_undisturbed().name)).directory


@functools.cache
def _undisturbed() -> tempfile.TemporaryDirectory[str]:
    output = tempfile.TemporaryDirectory()
    pipeline.run(small_config(Path(output.name)), backend=LocalBackend())
    return output


def begin_at(stage: str, config: RunConfig, done: Path) -> None:
    """Put what another run made before a stage into this one's directory."""
    pipeline.claim(config, redo=False)
    names = [each.name for each in STAGES]
    for before in STAGES[: names.index(stage)]:
        shutil.copytree(done / before.directory, config.directory / before.directory)


def same_outcome(directory: Path, undisturbed: Path) -> None:
    """Weights and final loss are the same, bit for bit."""
    assert config_of(directory).name == config_of(undisturbed).name
    submodels, whole = (
        sorted((undisturbed / stage).glob(files))
        for stage, files in (("submodels", "*/model.safetensors"), ("finetuned", "*.safetensors"))
    )  # each worker of a gang writes a file
    assert len(submodels) >= config_of(undisturbed).cluster_count  # one more after syncs: the common backbone
    assert whole
    for theirs in (*submodels, *whole):
        part = theirs.relative_to(undisturbed)
        assert (directory / part).read_bytes() == theirs.read_bytes(), part
    assert last_loss(directory) == last_loss(undisturbed)


def units(directory: Path, stage: str) -> list[dict[str, Any]]:
    """The records of a stage's trainings."""
    manifest = read_manifest(directory / next(known.directory for known in STAGES if known.name == stage))
    assert manifest is not None
    return list(manifest.summary["units"])


def config_of(directory: Path) -> RunConfig:
    return read_stored_config((directory / "config.json").read_bytes(), directory)


def last_loss(directory: Path) -> float:
    manifest = read_manifest(directory / "finetuned")
    assert manifest is not None
    return manifest.summary["units"][0]["loss"]
