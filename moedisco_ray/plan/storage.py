"""Bytes that each stage keeps in the run directory, on a card, in memory and on a node's disk, and that it moves.

If the run directory is in object storage, no node's disk holds it. A worker's disk then holds the stage's inputs, its
results until they are uploaded, and one checkpoint until it is uploaded. The figures follow from the sizes of models
and from token counts:

* corpus: text (4 bytes per token), token ids (4) and packed tokens (2, or 4 if the vocabulary has more than 65,536
  entries);
* cluster: packed tokens of all clusters and, if the vectors are hidden states, 4 bytes per dimension of each document;
* models: weights in the training's precision;
* checkpoints: weights and optimizer state; each training keeps two checkpoints at a time;
* seed and sub-models: every sync adds the bytes that `plan.sync_traffic` counts.
* seed: every member reads all packed tokens of the seed phase and writes the finished model; the run keeps one copy;
* merge: all sub-models are read, each with its whole backbone;
* evaluate: the finished model, the merged one, the seed and all sub-models are read;
* fine-tune, and a seed of several workers: they also send each other what `plan.gang_traffic` counts.

`plan.stage_memory` has the memory of the stages that run text through a model. Without a card, it is in the machine's
memory. `plan.host_memory` bounds the memory of corpus, cluster and decompose.

The number of checkpoints follows from `checkpoint.every` or, with `auto`, from the interval for the assumed rate of
worker losses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.stages import STAGES
from moedisco_ray.plan.estimate import CLUSTERED
from moedisco_ray.plan.host_memory import (
    ID_BYTES,
    TEXT_BYTES_PER_TOKEN,
    cluster_memory,
    corpus_memory,
    decompose_memory,
)
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.plan.speed import STORE_BYTES_PER_SECOND
from moedisco_ray.plan.stage_memory import InferencePlan
from moedisco_ray.policies.checkpointing import SaveCost, interval, loss_rate

_KEPT_CHECKPOINTS = 2
"""Checkpoints of one training that exist at the same time: the newest, and the one before it."""
_COPY_BYTES_PER_SECOND = 4e9
"""Assumed speed at which a checkpoint is copied from a GPU to host memory (bytes/s); training pauses meanwhile."""


class StageStorage(BaseModel, frozen=True):
    """Storage, memory and traffic of one stage, in bytes."""

    stage: str
    pool: str
    """`low_memory`, `high_memory`, or `cpu` for work on nodes with free CPUs: text processing and decompose."""
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
    device_memory: int = 0
    """Memory of the card of one worker; 0 without a card."""
    worker_memory: int = 0
    """Host memory of one worker, without its process: offloaded optimizer state, a checkpoint until it is stored, what
    `plan.host_memory` computes for the stage, and on a CPU what would be in a card's memory."""
    moved: int
    """Bytes that all workers of the stage together read from storage and write to storage."""
    exchanged: int = 0
    """Bytes that the workers of a gang send each other, in all steps together."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """Facts about a training stage from which its storage is computed.

    Attributes:
        pool: Name of the pool.
        units: Number of trainings of the stage.
        workers: Workers per model.
        steps: Optimizer steps of one model.
        hours: Training time of one model in hours.
        weights: Bytes of one model's weights.
        optimizer: Bytes of one model's optimizer state.
        frozen: Bytes of the weights that are not trained, which checkpoints leave out.
        offloaded: Bytes of the part of the optimizer state that is in host memory.
        device: Bytes of GPU memory of one worker.
        handed_over: Bytes of the optimizer state for the next training, in the dtype of the weights.
        tokens: Training tokens, summed over trainings.
        synced: Bytes that all syncs transfer.
        exchanged: Bytes that the workers of a gang send each other, in all steps together.
    """

    pool: str
    units: int
    workers: int
    steps: int
    hours: float
    weights: int
    optimizer: int
    offloaded: int
    device: int
    handed_over: int
    tokens: int
    synced: int = 0
    frozen: int = 0
    exchanged: int = 0

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint of one model."""
        return self.weights - self.frozen + self.optimizer


def plan_storage(
    config: RunConfig,
    trained: Mapping[str, Trained],
    inference: Sequence[InferencePlan],
    vocab_size: int,
    text_bytes: int | None,
) -> tuple[StageStorage, ...]:
    """Storage of every stage that stores files, in pipeline order.

    Args:
        config: The run's configuration.
        trained: Facts about the training stages, by stage.
        inference: The stages that run text through a model without training it.
        vocab_size: Entries of the vocabulary.
        text_bytes: Size of the corpus (bytes). If it is None, the corpus is assumed to have `tokens.total` tokens.
    """
    planner = _Planner(config, trained, {each.stage: each for each in inference}, vocab_size, text_bytes)
    found = (planner.stage(stage.name) for stage in STAGES)
    return tuple(each for each in found if each is not None)


def joint_storage(config: RunConfig, whole: Trained, vocab_size: int) -> StageStorage:
    """Storage of a training of the whole model on all tokens, without sub-models.

    Args:
        config: The run's configuration.
        whole: Facts about this training.
        vocab_size: Entries of the vocabulary.
    """
    found = _Planner(config, {"finetune": whole}, {}, vocab_size, None).training("finetune", whole)
    return found.model_copy(update={"stage": "joint training"})


def checkpoint_count(steps: int, hours: float, every: int | None, size: int, workers: int) -> int:
    """Number of checkpoints that a training writes.

    Args:
        steps: Optimizer steps.
        hours: Training time in hours.
        every: Steps between checkpoints. If it is None, `policies.checkpointing` chooses the interval with the least
            expected cost.
        size: Bytes of a checkpoint.
        workers: Workers that train together.
    """
    if every is not None:
        return steps // every
    stall, latency = size / workers / _COPY_BYTES_PER_SECOND, size / workers / STORE_BYTES_PER_SECOND
    seconds = interval(SaveCost(stall, stall + latency), loss_rate(0, 0.0), workers)
    return min(steps, math.floor(3600 * hours / seconds))


class _Planner:
    def __init__(
        self,
        config: RunConfig,
        trained: Mapping[str, Trained],
        inference: Mapping[str, InferencePlan],
        vocab_size: int,
        text_bytes: int | None,
    ) -> None:
        self._config, self._trained, self._inference, self._vocab_size = config, trained, inference, vocab_size
        self._token_bytes = 2 if vocab_size <= 1 << 16 else 4
        self._corpus_tokens = config.tokens.total if text_bytes is None else text_bytes // TEXT_BYTES_PER_TOKEN
        finetune = trained.get("finetune")
        earlier = trained.get("submodels", trained.get("seed"))
        parts = 0 if earlier is None else earlier.weights * earlier.units
        self._whole = parts if finetune is None else finetune.weights
        is_kept = (
            finetune is not None
            and config.finetune.keep_optimizer_state
            and (earlier is None or earlier.handed_over > 0)
        )
        self._kept = 2 * self._whole if is_kept else 0

    def stage(self, name: str) -> StageStorage | None:
        """Storage of one stage; None if the stage stores no large files."""
        if name in self._trained:
            return self.training(name, self._trained[name])
        match name:
            case "corpus":
                return self._corpus()
            case "cluster":
                return self._cluster() if self._config.tokens.decoupled else None
        sizes = self._sizes(name)
        return None if sizes is None else self._models(name, read=sizes[0], stored=sizes[1])

    def _sizes(self, name: str) -> tuple[int, int] | None:
        """Bytes of the models that a stage without training reads, and of those that it stores; None without models."""
        parts, earlier = self._trained.get("submodels"), self._trained.get("submodels", self._trained.get("seed"))
        match name:
            case "submodels" | "finetune":
                return None  # untrained: takes over its input
            case "seed" | "decompose":
                return None if parts is None else self._divided(name, parts)
            case "merge":
                read = 0
                if earlier is not None:
                    read = earlier.units * (earlier.weights + (earlier.handed_over if self._kept else 0))
                return read, self._whole + self._kept
            case "evaluate":
                return self._evaluated(), 0
            case "export":
                return self._whole, self._whole
        raise LookupError(f"no storage is planned for stage {name}")

    def _divided(self, name: str, parts: Trained) -> tuple[int, int]:
        """Bytes that an untrained seed or the decomposition reads and stores: models that the sub-models start from."""
        if name == "seed":
            return 0, parts.weights
        # The backbone is stored once, so all sub-models together take the space of the whole model.
        every = parts.units * parts.weights
        return parts.weights, min(self._whole, every) if "finetune" in self._trained else every

    def _evaluated(self) -> int:
        """Bytes of all models that the evaluation reads: the finished one, and those that it was made of."""
        seed, parts = self._trained.get("seed"), self._trained.get("submodels")
        merged = self._whole if parts is not None and "finetune" in self._trained else 0
        return (
            self._whole
            + merged
            + (0 if seed is None else seed.weights)
            + (0 if parts is None else parts.units * parts.weights)
        )

    def _corpus(self) -> StageStorage:
        text = TEXT_BYTES_PER_TOKEN * self._corpus_tokens
        stored = text + (ID_BYTES + self._token_bytes) * self._corpus_tokens
        # The text is moved four times: read, written and read again by the shuffle, and written with its tokens.
        return StageStorage(
            stage="corpus",
            pool="cpu",
            stored=stored,
            node_disk=text + stored,
            worker_memory=corpus_memory(text),
            moved=3 * text + stored,
        )

    def _cluster(self) -> StageStorage:
        config = self._config
        tokens = round(CLUSTERED * config.tokens.submodels)
        vectors, device, host = 0, 0, 0
        if config.vectors_pool is not None:
            device, host = self._device_and_host("cluster")
            vectors = (
                4 * config.model.architecture.hidden_size * -(-self._corpus_tokens // config.corpus.sequence_length)
            )
        packed = self._token_bytes * tokens
        documents = (TEXT_BYTES_PER_TOKEN + ID_BYTES) * self._corpus_tokens
        return StageStorage(
            stage="cluster",
            pool="cpu",
            stored=packed + vectors,
            device_memory=device,
            worker_memory=host + cluster_memory(config, self._corpus_tokens, self._vocab_size),
            node_disk=documents + packed + vectors,
            moved=2 * documents + packed + 2 * vectors,
        )

    def training(self, name: str, each: Trained) -> StageStorage:
        """Storage of one training stage."""
        handed_over = each.handed_over if self._keeps_optimizer_state(name) else 0
        kept = each.weights + handed_over
        packed = self._token_bytes * each.tokens
        stored, written = each.units * kept, each.units * kept
        if name == "seed":
            # All members write the same model, and only the first one its optimizer state.
            stored, written = kept, each.units * each.weights + handed_over
            packed *= each.units
        share, inputs = each.checkpoint // each.workers, each.weights + packed // each.units
        saves = checkpoint_count(each.steps, each.hours, self._config.checkpoint.steps, each.checkpoint, each.workers)
        # Each worker reads the whole model and all tokens that its model trains on.
        read = each.workers * (each.units * each.weights + packed)
        return StageStorage(
            stage=name,
            pool=each.pool,
            workers=each.units * each.workers,
            stored=stored,
            checkpoints=_KEPT_CHECKPOINTS * each.units * each.checkpoint,
            node_disk=inputs + kept if each.workers > 1 else 0,
            worker_disk=share + (0 if each.workers > 1 else inputs + kept),
            device_memory=each.device,
            worker_memory=share + each.offloaded,
            moved=read + written + each.units * saves * each.checkpoint + each.synced,
            exchanged=each.exchanged,
        )

    def _models(self, name: str, *, stored: int, read: int) -> StageStorage:
        config, pool = self._config, self._config.finetune_pool
        on_cpu = name in ("seed", "decompose")
        if on_cpu:
            shape = submodel_architecture(config.model.family_name, config.model.architecture, config.cluster_count)
            device, host = 0, decompose_memory(count_parameters(config.model.family_name, shape, self._vocab_size))
        else:
            device, host = self._device_and_host(name)
        return StageStorage(
            stage=name,
            pool="cpu" if on_cpu else pool.name,
            stored=stored,
            worker_disk=read + stored,
            moved=read + stored,
            device_memory=device,
            worker_memory=host,
        )

    def _device_and_host(self, stage: str) -> tuple[int, int]:
        """GPU memory and host memory of the worker of a stage that runs text through a model."""
        found = self._inference.get(stage)
        if found is None:
            return 0, 0
        return (found.memory.total, 0) if found.fits_known else (0, found.memory.total - found.memory.overhead)

    def _keeps_optimizer_state(self, stage: str) -> bool:
        return (
            self._config.submodels.keep_optimizer_state
            if stage == "seed"
            else (stage == "submodels" and self._config.finetune.keep_optimizer_state)
        )
