"""What a training stage trains, and with what: the input of its plan."""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.config import AnyPool, Lora, LowMemoryPool, Optimizer, RunConfig, TrainingStageName
from moedisco_ray.plan.remedy import Spread
from moedisco_ray.plan.streamed_way import on_cards
from moedisco_ray.policies.gang import counts

ALL_WEIGHTS = Lora()
"""A training of all weights."""


@dataclasses.dataclass(frozen=True)
class StageTraining:
    """A training stage to plan.

    Attributes:
        stage: The stage.
        pool: Pool that trains it.
        optimizer: Optimizer settings of the configuration.
        units: Number of trainings.
        workers: Number of workers that train at the same time.
        tokens: Training tokens, summed over units.
        sharded: Whether the workers share one model (the fine-tune's gang).
        spread: The setting that divides a model among more workers, or into more models.
        lora: Adapters that train instead of the weights.
        owned: Price of each data owner's seat ($/h).
    """

    stage: TrainingStageName
    pool: AnyPool
    optimizer: Optimizer
    units: int
    workers: int
    tokens: int
    sharded: bool
    spread: Spread
    lora: Lora = ALL_WEIGHTS
    owned: tuple[float, ...] = ()


def more_clusters(config: RunConfig) -> Spread:
    """The numbers of clusters, into which a model can be divided, that are larger than that of the configuration."""
    now, experts = config.cluster_count, config.model.architecture.num_experts
    return Spread("clusters.count", now, tuple(n for n in range(now + 1, experts + 1) if experts % n == 0))


def gang_training(config: RunConfig, pool: AnyPool, tokens: int) -> StageTraining:
    """Training of the whole model on a pool."""
    length, workers = config.corpus.sequence_length, pool.fewest_workers
    optimizer = on_cards(config.finetune.optimizer, pool, length)
    sequences = optimizer.batch_tokens // length
    # To one machine, a pool streams. Own cards are as many as the machine has; of several machines, it is not known.
    is_own = pool.gpu and not pool.price_per_hour and pool.most_workers <= pool.gpus_per_node
    most = pool.gpus_per_node if is_own else sequences
    more_workers = () if pool.memory == "streamed" else counts(sequences, workers + 1, most)
    size = "max_workers" if isinstance(pool, LowMemoryPool) else "workers"
    spread = Spread(f"pools.{pool.name}.{size}", workers, more_workers)
    on_one = pool.most_workers == 1 or pool.memory == "streamed"  # worker
    return StageTraining(
        "finetune",
        pool=pool,
        optimizer=optimizer,
        units=1,
        workers=workers,
        tokens=tokens,
        sharded=True,
        spread=spread,
        lora=config.finetune.lora if on_one else ALL_WEIGHTS,
    )
