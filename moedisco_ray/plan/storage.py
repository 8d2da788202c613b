"""Bytes that each stage keeps in the run directory, holds on a node's disk, and moves over the network.

If the run directory is in object storage, no node's disk holds it. A worker's disk then holds the stage's inputs, its results until
they are uploaded, and one checkpoint until it is uploaded. The figures follow from the sizes of models and from token counts:

* corpus: text (4 bytes per token), token ids (4) and packed tokens (2, or 4 if the vocabulary has more than 65,536 entries);
* cluster: packed tokens of all clusters and, if the vectors are hidden states, 4 bytes per dimension of each document;
* models: weights in the training's precision;
* checkpoints: weights and optimizer state; each training keeps two checkpoints at a time;
* sub-models: every sync adds the bytes that `plan.sync_traffic` counts.

The number of checkpoints follows from `checkpoint.every` or, with `auto`, from the interval for the assumed rate of worker losses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.stages import STAGES
from moedisco_ray.plan.estimate import CLUSTERED
from moedisco_ray.policies.checkpointing import SaveCost, interval, loss_rate

TEXT_BYTES_PER_TOKEN = 4
"""Assumed bytes of text per token: typical of English text and a vocabulary of 32,000 or more entries."""
_ID_BYTES = 4
_KEPT_CHECKPOINTS = 2
"""Checkpoints of one training that exist at the same time: the newest, and the one before it."""
_COPY_BYTES_PER_SECOND = 4e9
"""Assumed speed at which a checkpoint is copied from a GPU to host memory (bytes/s); training pauses meanwhile."""
_STORE_BYTES_PER_SECOND = 125e6
"""Assumed speed at which one worker writes to storage (bytes/s): a network of 1 Gbit/s."""


class StageStorage(BaseModel):
    """Storage, memory and traffic of one stage, in bytes."""

    model_config = ConfigDict(frozen=True)

    stage: str
    pool: str
    """`low_memory`, `high_memory`, or `cpu` for text processing."""
    workers: int = 1
    """Number of workers that run at the same time if the pool has room for all of them."""
    stored: int
    """Size of the finished stage in the run directory."""
    checkpoints: int = 0
    """Size of all checkpoints that exist at the same time while the stage runs; they are deleted at its end."""
    node_disk: int = 0
    """Disk space on one node for files that its workers share; for text processing, the total of all nodes."""
    worker_disk: int = 0
    """Disk space for files of one worker that other workers do not share."""
    worker_memory: int = 0
    """Host memory in which one worker holds a checkpoint until it is stored."""
    moved: int
    """Bytes that all workers of the stage together read from storage and write to storage."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """Facts about a training stage from which its storage is computed.

    Attributes:
        pool: Name of the pool.
        units: Number of models that train independently.
        workers: Workers per model.
        steps: Optimizer steps of one model.
        hours: Training time of one model in hours.
        weights: Bytes of one model's weights.
        optimizer: Bytes of one model's optimizer state.
        tokens: Training tokens, summed over models.
        synced: Bytes that all syncs transfer.
    """

    pool: str
    units: int
    workers: int
    steps: int
    hours: float
    weights: int
    optimizer: int
    tokens: int
    synced: int = 0

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint of one model."""
        return self.weights + self.optimizer


def plan_storage(
    config: RunConfig, trained: Mapping[str, Trained], vocab_size: int, text_bytes: int | None,
) -> tuple[StageStorage, ...]:
    """Storage of every stage that stores files, in pipeline order.

    Args:
        config: The run's configuration.
        trained: Facts about the training stages, by stage.
        vocab_size: Entries of the vocabulary.
        text_bytes: Size of the corpus (bytes). If it is None, the corpus is assumed to have `tokens.total` tokens.
    """
    planner = _Planner(config, trained, vocab_size, text_bytes)
    found = (planner.stage(stage.name) for stage in STAGES)
    return tuple(each for each in found if each is not None)


def checkpoint_count(steps: int, hours: float, every: int | None, size: int, workers: int) -> int:
    """Number of checkpoints that a training writes.

    Args:
        steps: Optimizer steps.
        hours: Training time in hours.
        every: Steps between checkpoints. If it is None, `policies.checkpointing` chooses the interval with the least expected cost.
        size: Bytes of a checkpoint.
        workers: Workers that train together.
    """
    if every is not None:
        return steps // every
    stall, latency = size / workers / _COPY_BYTES_PER_SECOND, size / workers / _STORE_BYTES_PER_SECOND
    seconds = interval(SaveCost(stall, stall + latency), loss_rate(0, 0.0), workers)
    return min(steps, math.floor(3600 * hours / seconds))


class _Planner:
    def __init__(self, config: RunConfig, trained: Mapping[str, Trained], vocab_size: int, text_bytes: int | None) -> None:
        self._config, self._trained = config, trained
        self._token_bytes = 2 if vocab_size <= 1 << 16 else 4
        self._corpus_tokens = config.tokens.total if text_bytes is None else text_bytes // TEXT_BYTES_PER_TOKEN
        models = [*trained.values()]
        finetune = trained.get("finetune")
        self._whole = sum(each.weights * each.units for each in models) if finetune is None else finetune.weights
        self._kept = finetune.optimizer if finetune is not None and config.finetune.keep_optimizer_state else 0

    def stage(self, name: str) -> StageStorage | None:
        """Storage of one stage; None if the stage stores no large files."""
        if name in self._trained:
            return self._training(name, self._trained[name])
        match name:
            case "corpus":
                return self._corpus()
            case "cluster" if self._config.tokens.decoupled:
                return self._cluster()
            case "decompose" if "submodels" in self._trained:
                # The backbone is stored once, so all sub-models together take the space of the whole model.
                part = self._trained["submodels"]
                stored = min(self._whole, part.units * part.weights) if "finetune" in self._trained else part.units * part.weights
                return self._models(name, stored=stored, read=part.weights)
            case "merge" | "export":
                size = self._whole + (self._kept if name == "merge" else 0)
                return self._models(name, stored=size, read=size)
        return None

    def _corpus(self) -> StageStorage:
        text = TEXT_BYTES_PER_TOKEN * self._corpus_tokens
        stored = text + (_ID_BYTES + self._token_bytes) * self._corpus_tokens
        # The text is moved four times: read, written and read again by the shuffle, and written with its tokens.
        return StageStorage(stage="corpus", pool="cpu", stored=stored, node_disk=text + stored, moved=3 * text + stored)

    def _cluster(self) -> StageStorage:
        config = self._config
        tokens = round(CLUSTERED * config.tokens.submodels)
        vectors = 0
        if config.vectors_pool is not None:
            vectors = 4 * config.model.architecture.hidden_size * -(-self._corpus_tokens // config.corpus.sequence_length)
        packed = self._token_bytes * tokens
        documents = (TEXT_BYTES_PER_TOKEN + _ID_BYTES) * self._corpus_tokens
        return StageStorage(
            stage="cluster", pool="cpu", stored=packed + vectors,
            node_disk=documents + packed + vectors, moved=2 * documents + packed + 2 * vectors)

    def _training(self, name: str, each: Trained) -> StageStorage:
        kept = each.checkpoint if self._keeps_optimizer_state(name) else each.weights
        packed = self._token_bytes * each.tokens
        share, inputs = each.checkpoint // each.workers, each.weights + packed // each.units
        saves = checkpoint_count(each.steps, each.hours, self._config.checkpoint.steps, each.checkpoint, each.workers)
        # Each worker reads the whole model and all tokens that its model trains on.
        read = each.workers * (each.units * each.weights + packed)
        return StageStorage(
            stage=name, pool=each.pool, workers=each.units * each.workers, stored=each.units * kept,
            checkpoints=_KEPT_CHECKPOINTS * each.units * each.checkpoint,
            node_disk=inputs + kept if each.workers > 1 else 0, worker_disk=share + (0 if each.workers > 1 else inputs + kept),
            worker_memory=share,
            moved=read + each.units * (kept + saves * each.checkpoint) + each.synced)

    def _models(self, name: str, *, stored: int, read: int) -> StageStorage:
        return StageStorage(
            stage=name, pool=self._config.finetune_pool.name, stored=stored, worker_disk=read + stored, moved=read + stored)

    def _keeps_optimizer_state(self, stage: str) -> bool:
        return self._config.submodels.keep_optimizer_state if stage == "seed" else (
            stage == "submodels" and self._config.finetune.keep_optimizer_state)
