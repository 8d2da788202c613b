"""Sizes of the files of a run: of models, checkpoints and packed tokens, and of what a training reads and writes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from pydantic import BaseModel

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.limits import TEXT_BYTES_PER_TOKEN
from moedisco_ray.core.stages import TRAINING, TrainingStage
from moedisco_ray.plan.host_memory import decompose_memory
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.plan.speed import STORE_BYTES_PER_SECOND
from moedisco_ray.plan.worker_plan import InferencePlan
from moedisco_ray.policies.checkpointing import SaveCost, interval, loss_rate

_KEPT_CHECKPOINTS = 2
"""Checkpoints of one training that exist at the same time: the newest, and the one before it."""
_COPY_BYTES_PER_SECOND = 4e9
"""Assumed speed at which a checkpoint is copied from a GPU to host memory (bytes/s); training pauses meanwhile."""


class StageStorage(BaseModel, frozen=True, defer_build=True):
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
        host: Bytes of host memory of one worker that trains from there, and writes checkpoints without a copy; else 0.
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
    host: int = 0
    for_syncs: int = 0

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint of one model."""
        return self.weights - self.frozen + self.optimizer


class Files:
    """Sizes of what the stages of a run read and write.

    Attributes:
        config: The run's configuration.
        trained: Facts about the training stages, by stage.
        vocab_size: Entries of the vocabulary.
        corpus_tokens: Tokens of the corpus.
        token_bytes: Bytes of a packed token.
        whole: Bytes of the whole MoE.
        kept: Bytes of the optimizer state that the merge keeps for the fine-tune.
    """

    def __init__(
        self,
        config: RunConfig,
        trained: Mapping[str, Trained],
        inference: Mapping[str, InferencePlan],
        vocab_size: int,
        text_bytes: int | None,
    ) -> None:
        self.config, self.trained, self.vocab_size, self._inference = config, trained, vocab_size, inference
        self.token_bytes = 2 if vocab_size <= 1 << 16 else 4
        self.corpus_tokens = config.tokens.total if text_bytes is None else text_bytes // TEXT_BYTES_PER_TOKEN
        finetune = next((trained[each.name] for each in TRAINING if each.trains_whole and each.name in trained), None)
        earlier = self.earlier
        parts = 0 if earlier is None else earlier.weights * earlier.units
        self.whole = parts if finetune is None else finetune.weights
        is_kept = (
            finetune is not None
            and config.finetune.keep_optimizer_state
            and (earlier is None or earlier.handed_over > 0)
        )
        self.kept = 2 * self.whole if is_kept else 0

    @property
    def earlier(self) -> Trained | None:
        """The training before the merge: of the sub-models or, without one, of the seed."""
        parts = [stage.name for stage in TRAINING if not stage.trains_whole and stage.name in self.trained]
        return self.trained[parts[-1]] if parts else None

    def training(self, stage: TrainingStage, each: Trained) -> StageStorage:
        """Storage of one training stage."""
        handed_over = each.handed_over if stage.keeps_state(self.config) else 0
        kept = each.weights + handed_over
        packed = self.token_bytes * each.tokens
        stored, written = each.units * kept, each.units * kept
        if stage.members(self.config) > 1:
            # All members write the same model, and only the first one its optimizer state.
            stored, written = kept, each.units * each.weights + handed_over
            packed *= each.units
        share, inputs = each.checkpoint // each.workers, each.weights + packed // each.units
        saves = checkpoint_count(each.steps, each.hours, self.config.checkpoint.steps, each.checkpoint, each.workers)
        # Each worker reads the whole model and all tokens that its model trains on.
        read = each.workers * (each.units * each.weights + packed)
        return StageStorage(
            stage=stage.name,
            pool=each.pool,
            workers=each.units * each.workers,
            stored=stored,
            checkpoints=_KEPT_CHECKPOINTS * each.units * each.checkpoint,
            node_disk=inputs + kept if each.workers > 1 else 0,
            worker_disk=share + (0 if each.workers > 1 else inputs + kept),
            device_memory=each.device,
            worker_memory=(each.host or share + each.offloaded) + each.for_syncs,
            moved=read + written + each.units * saves * each.checkpoint + each.synced,
            exchanged=each.exchanged,
        )

    def models(self, stage: str, *, stored: int, read: int) -> StageStorage:
        """Storage of a stage whose worker reads and writes models on the pool of the fine-tune."""
        device, host = self.device_and_host(stage)
        return StageStorage(
            stage=stage,
            pool=self.config.finetune_pool.name,
            stored=stored,
            worker_disk=read + stored,
            moved=read + stored,
            device_memory=device,
            worker_memory=host,
        )

    def starts(self, stage: str, *, stored: int, read: int, pool: str = "cpu") -> StageStorage:
        """Storage of a stage that writes models from which sub-models start, by default on a node with a free CPU."""
        config, (device, host) = self.config, self.device_and_host(stage)
        shape = submodel_architecture(config.model.family_name, config.model.architecture, config.cluster_count)
        part = count_parameters(config.model.family_name, shape, self.vocab_size)
        return StageStorage(
            stage=stage,
            pool=pool,
            stored=stored,
            worker_disk=read + stored,
            moved=read + stored,
            device_memory=device,
            worker_memory=max(host, decompose_memory(part)),
        )

    def device_and_host(self, stage: str) -> tuple[int, int]:
        """GPU memory and host memory of the worker of a stage that runs text through a model."""
        found = self._inference.get(stage)
        if found is None:
            return 0, 0
        return (found.memory.total, 0) if found.fits_known else (0, found.memory.total - found.memory.overhead)


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
