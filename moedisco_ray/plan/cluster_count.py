"""The number of clusters for `clusters.count: auto`: the fewest sub-models, at least two, that fit the low-memory pool.

With few sub-models, each has many experts, and the seed model too. At the same operations and dollars that lowers the
loss: where 2 of 16 experts are active, two sub-models of 8 experts end 0.07 nats below four of 4 with Muon (one seed),
and 0.02 with AdamW (median of three, 0.004 to 0.07; docs/results.md). More sub-models take fewer hours, and train on
smaller cards.

A candidate C divides the number of experts N, is allowed by the family's router, and is larger than the number of data
owners. The first candidate whose sub-models fit the low-memory pool is chosen, in this order:

* at least two sub-models, with at least top-k experts in each: the smallest C first;
* one, if no other number leaves top-k experts;
* fewer experts in each than top-k: the smallest C first.

Sub-models for which there is no slot take turns. If no sub-model fits, the last candidate is chosen, and the plan says
what to change.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from moedisco_ray.core.config import Optimizer, RunConfig
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.run import check_division, divisors
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.fitting import choose
from moedisco_ray.plan.memory import GIB, Memory, worker_memory
from moedisco_ray.plan.parameters import submodel_architecture
from moedisco_ray.plan.vocabulary import planned_vocab_size


def low_memory_slots(config: RunConfig) -> int:
    """Number of sub-models that can train at the same time: slots of the low-memory pool, and one per data owner."""
    low = config.pools.low_memory
    return min(low.max_workers, sum(kind.max_workers for kind in low.node_types)) + len(config.owners)


def with_cluster_count(config: RunConfig) -> RunConfig:
    """The configuration with a number in place of `clusters.count: auto`; without `auto`, the configuration itself.

    Raises:
        ConfigError: No number of clusters suits the model and the data owners, or another setting contradicts the
            number.
        CheckpointError: As `planned_vocab_size`.
    """
    if config.clusters.count != "auto":
        return config
    candidates = list(_candidates(config))
    if not candidates:
        raise ConfigError(
            "clusters.count",
            "auto",
            f"finds no number: each of the {len(config.owners)} data owners needs a cluster, text without an owner "
            f"needs one, and the number must divide the model's {config.model.architecture.num_experts} experts",
        )
    vocab_size = planned_vocab_size(config)
    count = next((each for each in candidates if _fits(config, each, vocab_size)), candidates[-1])
    try:
        return RunConfig.model_validate(
            config.model_dump() | {"clusters": config.clusters.model_dump() | {"count": count}}
        )
    except ValidationError as error:
        raise first_mistake(error.errors()) from error


def _candidates(config: RunConfig) -> Iterator[int]:
    """The allowed numbers of clusters, the best one first."""
    sizes = config.model.architecture
    allowed = [
        count for count in divisors(sizes.num_experts) if count > len(config.owners) and _is_allowed(config, count)
    ]
    enough = [count for count in allowed if count > 1 and sizes.num_experts // count >= sizes.num_experts_per_tok]
    yield from enough
    yield from (count for count in allowed if count == 1)
    yield from (count for count in allowed if count > 1 and count not in enough)


def _is_allowed(config: RunConfig, count: int) -> bool:
    try:
        check_division(config.model.family_name, config.model.architecture, count, config.model.experts_together)
    except ValueError:
        return False
    return True


def _fits(config: RunConfig, count: int, vocab_size: int) -> bool:
    """Whether a sub-model fits the largest node type, with its own settings or with those that a plan would choose."""
    family, pool, optimizer, lora = (
        config.model.family_name,
        config.pools.low_memory,
        config.submodels.optimizer.on(config.pools.low_memory),
        config.submodels.lora,
    )
    length = config.corpus.sequence_length
    shape = submodel_architecture(family, config.model.architecture, count)
    largest_gb = max(kind.memory_gb for kind in pool.node_types)

    def measure(trial: Optimizer) -> Memory:
        return worker_memory(family, shape, vocab_size, trial, sequence_length=length, gpu=pool.gpu, lora=lora)

    if measure(optimizer).total <= largest_gb * GIB:
        return True
    return (
        pool.gpu > 0
        and choose(
            measure,
            optimizer,
            section="submodels.optimizer",
            sequence_length=length,
            pool_gb=largest_gb,
            workers=1,
            alone=not lora.rank,
            step_seconds=1.0,
        )
        is not None
    )
