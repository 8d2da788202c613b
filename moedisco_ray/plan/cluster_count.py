"""The number of clusters for `clusters.count: auto`: the fewest sub-models, at least two, that fit at the least cost.

With few sub-models, each has many experts, and the seed model too. At the same operations and dollars that lowers the
loss: where 2 of 16 experts are active, two sub-models of 8 experts end 0.07 nats below four of 4 with Muon (one seed),
and 0.02 with AdamW (median of three, 0.004 to 0.07; docs/results.md). More sub-models take fewer hours, and train on
smaller cards.

A candidate C divides the number of experts N, is allowed by the family's router, and is larger than the number of data
owners. Candidates are of three kinds, and the first kind with one that fits the low-memory pool decides:

* at least two sub-models, with at least top-k experts in each;
* one, if no other number leaves top-k experts;
* fewer experts in each than top-k.

A larger C may fit a card as configured where a smaller one fits only with settings that lengthen its steps: it
recomputes activations, or copies offloaded moments. Of the candidates of a kind that fit, the one with the shortest
steps is chosen, as a multiple of those without such settings; of equal ones the smallest.

Sub-models for which there is no slot take turns. If no sub-model fits, the last candidate is chosen, and the plan says
what to change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moedisco_ray.core.config import Optimizer, RunConfig
from moedisco_ray.core.config.run import check_division, divisors
from moedisco_ray.core.config.starts import changed
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.fitting import Room, choose, time_factor
from moedisco_ray.plan.memory import Memory
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.plan.seed_workers import member_memory, seed_workers
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
    kinds = _candidates(config)
    candidates = [count for kind in kinds for count in kind]
    if not candidates:
        raise ConfigError(
            "clusters.count",
            "auto",
            f"finds no number: each of the {len(config.owners)} data owners needs a cluster, text without an owner "
            f"needs one, and the number must divide the model's {config.model.architecture.num_experts} experts",
        )
    vocab_size = planned_vocab_size(config)
    count = next(filter(None, (_cheapest(config, kind, vocab_size) for kind in kinds)), candidates[-1])
    return changed(config, {"clusters": {"count": count}})


def _candidates(config: RunConfig) -> tuple[list[int], ...]:
    """The allowed numbers of clusters, ascending, by kind; the best kind first."""
    sizes = config.model.architecture
    allowed = [
        count for count in divisors(sizes.num_experts) if count > len(config.owners) and _is_allowed(config, count)
    ]
    enough = [count for count in allowed if count > 1 and sizes.num_experts // count >= sizes.num_experts_per_tok]
    others = [count for count in allowed if count > 1 and count not in enough]
    return enough, [count for count in allowed if count == 1], others


def _cheapest(config: RunConfig, counts: Sequence[int], vocab_size: int) -> int | None:
    """The number whose sub-models fit with the smallest factor on the time of a step; None if none fits."""
    best, least = None, math.inf
    for count in counts:
        factor = _factor(config, count, vocab_size)
        if factor is not None and factor < least:
            best, least = count, factor
        if least <= 1:
            break
    return best


def _is_allowed(config: RunConfig, count: int) -> bool:
    try:
        check_division(config.model.family_name, config.model.architecture, count, config.model.experts_together)
    except ValueError:
        return False
    return True


def _factor(config: RunConfig, count: int, vocab_size: int) -> float | None:
    """Factor on the time of a step with which sub-models and seed fit the largest node type.

    1 with the settings of the configuration, or above 1 with those that a plan would choose; None if none make them
    fit.
    """
    pool, lora = config.pools.low_memory, config.submodels.lora
    family, optimizer, length = (
        config.model.family_name,
        config.submodels.optimizer.on(pool),
        config.corpus.sequence_length,
    )
    shape = submodel_architecture(family, config.model.architecture, count)
    divided = config.model_copy(update={"clusters": config.clusters.model_copy(update={"count": count})})
    gang = seed_workers(divided, vocab_size)
    flops = flops_per_token(count_parameters(family, shape, vocab_size), shape, length, checkpointing=False)
    step_seconds = flops * optimizer.batch_tokens / pool.flops(shape.num_experts)

    def measure(trial: Optimizer) -> Memory:
        return member_memory(divided, shape, vocab_size, trial, gang=gang, lora=lora)

    largest_gb = max(kind.memory_gb for kind in pool.node_types)
    if not measure(optimizer).fits(largest_gb, pool.host_gb_per_worker):
        choice = choose(
            measure,
            optimizer,
            Room(length, largest_gb, pool.host_gb_per_worker, workers=1, alone=gang[1] == 1 and not lora.rank),
            section="submodels.optimizer",
            step_seconds=step_seconds,
        )
        if choice is None or not pool.gpu:
            return None
        optimizer = choice.optimizer
    return time_factor(optimizer, measure(optimizer), step_seconds)
