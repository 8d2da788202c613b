"""What `pools.low_memory.seed_workers: auto` means, and what workers that train the seed together hold and exchange.

Each worker has a whole replica of the seed model, and its share of every batch; they add up their gradients once per
step. So the seed is the one that a single card would train, up to rounding, in fewer hours. The price is the exchange,
during which the cards wait: with r workers each sends 2 (r - 1) / r of 4 bytes per parameter in every step.

`auto` takes as many workers as divide the batch evenly, as far as their exchange takes at most a quarter of the time in
which they compute. A seed that trains on r cards then costs at most a quarter more than on one. Where batches are small
for the model, or workers have no GPU, it is one worker.
"""

from __future__ import annotations

import functools

from moedisco_ray.core.config import Architecture, Lora, Optimizer, RunConfig
from moedisco_ray.core.config.derived import with_conversations_apart
from moedisco_ray.plan.cost import flops_per_token, optimizer_flops_per_token
from moedisco_ray.plan.fitting import Room, choose
from moedisco_ray.plan.gang_traffic import GangTraffic, step_exchanges, total_bytes
from moedisco_ray.plan.memory import Memory
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.plan.streamed_way import training_memory
from moedisco_ray.plan.sync_memory import exchanged_weights, sync_memory
from moedisco_ray.policies.gang import counts
from moedisco_ray.policies.parallel import Layout

LARGEST_EXCHANGE = 0.25
"""Largest time of an exchange that `auto` accepts, as a multiple of the time in which the workers compute a step."""


def seed_workers(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    """The smallest and the largest number of workers that train the seed together; equal if the number is fixed.

    Args:
        config: The run's configuration, with a number of clusters.
        vocab_size: Rows of the embedding.
    """
    low, optimizer = config.pools.low_memory, config.submodels.optimizer.on(config.pools.low_memory)
    wanted = low.seed_workers
    if not config.tokens.seed:
        return 1, 1
    if wanted != "auto":
        return (wanted, wanted) if isinstance(wanted, int) else wanted
    if not low.gpu or config.alone_with_the_seed is not None:
        return 1, 1
    shape = submodel_architecture(config.model.family_name, config.model.architecture, config.cluster_count)
    length = config.corpus.sequence_length
    parameters = count_parameters(config.model.family_name, shape, vocab_size)
    flops = flops_per_token(parameters, shape, length, checkpointing=False) * optimizer.batch_tokens

    muon = optimizer_flops_per_token(config.model.family_name, shape, optimizer, low)
    muon_seconds = muon * optimizer.batch_tokens / low.flops(shape.num_experts)

    def is_worth_it(workers: int) -> bool:
        computing = flops / (workers * low.flops(shape.num_experts)) + muon_seconds / workers
        again = muon_seconds * (1 - 1 / workers)  # each has all weights, and so all of Muon's arithmetic
        return seed_traffic(config, shape, vocab_size, workers).seconds + again <= LARGEST_EXCHANGE * computing

    most = max(filter(is_worth_it, counts(optimizer.batch_tokens // length, 2, low.max_workers)), default=1)
    return 1, most if most == 1 or _fits(config, shape, vocab_size, most, flops) else 1


def _fits(config: RunConfig, shape: Architecture, vocab_size: int, workers: int, step_flops: float) -> bool:
    """Whether the seed fits with its own settings, or with those that a plan would choose for several workers."""
    low, optimizer = config.pools.low_memory, config.submodels.optimizer.on(config.pools.low_memory)

    def measure(trial: Optimizer) -> Memory:
        return member_memory(config, shape, vocab_size, trial, gang=(1, workers), lora=config.submodels.lora)

    return (
        measure(optimizer).fits(low.memory_gb, low.host_gb_per_worker)
        or choose(
            measure,
            optimizer,
            Room(config.corpus.sequence_length, low.memory_gb, low.host_gb_per_worker, workers=1, alone=False),
            section="submodels.optimizer",
            step_seconds=step_flops / low.flops(shape.num_experts),
        )
        is not None
    )


def member_memory(
    config: RunConfig, shape: Architecture, vocab_size: int, optimizer: Optimizer, *, gang: tuple[int, int], lora: Lora
) -> Memory:
    """Peak memory of a worker that trains a sub-model or the seed: the larger of those alone and in the largest gang.

    Args:
        config: The run's configuration.
        shape: Sizes of the model.
        vocab_size: Rows of the embedding.
        optimizer: Settings of the optimizer.
        gang: Smallest and largest number of workers that train the seed together.
        lora: Adapters of the sub-models.
    """
    measure = functools.partial(
        training_memory,
        config.model.family_name,
        shape,
        vocab_size,
        optimizer=with_conversations_apart(config, optimizer),
        residence=config.pools.low_memory.memory,
        sequence_length=config.corpus.sequence_length,
        gpu=config.pools.low_memory.gpu,
        lora=lora,
    )
    parameters = count_parameters(config.model.family_name, shape, vocab_size)
    exchanged = 0 if lora.rank else exchanged_weights(config, parameters)
    synced = sync_memory(config.submodels, parameters, exchanged, config.pools.low_memory.memory)
    alone = measure().model_copy(update={"synced": synced.total})
    if gang[1] == 1:
        return alone
    together = measure(workers=gang[1], exchange="step", layout=Layout(replicate=gang[1]))
    return max(alone, together, key=lambda each: each.total)


def seed_traffic(config: RunConfig, shape: Architecture, vocab_size: int, workers: int) -> GangTraffic:
    """Bytes that each of the workers sends in one step of the seed's training."""
    exchanges = step_exchanges(
        config.model.family_name,
        shape,
        count_parameters(config.model.family_name, shape, vocab_size),
        config.submodels.optimizer,
        sequence_length=config.corpus.sequence_length,
        gpu=config.pools.low_memory.gpu,
        layout=Layout(replicate=workers),
        exchange="step",
    )
    sent, seconds = total_bytes(exchanges), sum(each.seconds(config.pools.low_memory) for each in exchanges)
    return GangTraffic(bytes=sent, sharded=sent, divided=sent, expert=1, seconds=seconds)


def exchange_flops(config: RunConfig, traffic: GangTraffic, workers: int, experts: int) -> float:
    """Operations per token that the workers could do while they exchange gradients; 0 without GPUs of known speed."""
    low = config.pools.low_memory
    seconds = traffic.seconds if low.gpu else 0.0
    return seconds * workers * low.flops(experts) / config.submodels.optimizer.batch_tokens
