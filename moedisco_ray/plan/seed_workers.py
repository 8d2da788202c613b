"""The workers that train the seed together: how many `pools.low_memory.seed_workers: auto` means, and what they hold and exchange.

Each worker has a whole replica of the seed model, and its share of every batch; they add up their gradients once per step. So the
seed is the one that a single card would train, up to rounding, in fewer hours. The price is the exchange, during which the cards
wait: with r workers each sends 2 (r - 1) / r of 4 bytes per parameter in every step.

`auto` takes as many workers as divide the batch evenly, as far as their exchange takes at most a quarter of the time in which they
compute. A seed that trains on r cards then costs at most a quarter more than on one. Where batches are small for the model, or
workers have no GPU, it is one worker. A larger number can be set where cards share a node, whose links are faster than a network.
"""

from __future__ import annotations

from moedisco_ray.core.config import Architecture, Optimizer, RunConfig
from moedisco_ray.plan.cost import PEAK_FLOPS, UTILISATION, flops_per_token
from moedisco_ray.plan.gang_traffic import GangTraffic, step_bytes
from moedisco_ray.plan.memory import GIB, Memory, worker_memory
from moedisco_ray.plan.parameters import count_parameters, submodel_architecture
from moedisco_ray.policies.gang import counts
from moedisco_ray.policies.parallel import Layout

NETWORK_BYTES_PER_SECOND = 1.25e9
"""Assumed speed at which nodes of the low-memory pool exchange data (bytes/s, each way): a network of 10 Gbit/s."""
LARGEST_EXCHANGE = 0.25
"""Largest time of an exchange that `auto` accepts, as a multiple of the time in which the workers compute a step."""


def seed_workers(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    """The smallest and the largest number of workers that train the seed together; equal if the number is fixed.

    Args:
        config: The run's configuration, with a number of clusters.
        vocab_size: Rows of the embedding.
    """
    low, optimizer = config.pools.low_memory, config.submodels.optimizer
    wanted = low.seed_workers
    if wanted != "auto":
        return (wanted, wanted) if isinstance(wanted, int) else wanted
    if not low.gpu or not config.tokens.seed or config.alone_with_the_seed is not None:
        return 1, 1
    shape = submodel_architecture(config.model.family_name, config.model.architecture, config.cluster_count)
    length = config.corpus.sequence_length
    parameters = count_parameters(config.model.family_name, shape, vocab_size)
    flops = flops_per_token(parameters, shape, length, checkpointing=False) * optimizer.batch_tokens

    def is_worth_it(workers: int) -> bool:
        computing = flops / (workers * PEAK_FLOPS * UTILISATION * low.speed)
        exchanging = seed_traffic(config, shape, vocab_size, workers).bytes / NETWORK_BYTES_PER_SECOND
        return (
            exchanging <= LARGEST_EXCHANGE * computing
            and replica_memory(config, shape, vocab_size, optimizer, workers).total <= low.memory_gb * GIB)

    return 1, max(filter(is_worth_it, counts(optimizer.batch_tokens // length, 2, low.max_workers)), default=1)


def replica_memory(config: RunConfig, shape: Architecture, vocab_size: int, optimizer: Optimizer, workers: int) -> Memory:
    """Peak memory of each of several workers that train replicas of one model together."""
    return worker_memory(
        config.model.family_name, shape, vocab_size, optimizer, sequence_length=config.corpus.sequence_length,
        gpu=config.pools.low_memory.gpu, workers=workers, exchange="step", layout=Layout(replicate=workers))


def seed_traffic(config: RunConfig, shape: Architecture, vocab_size: int, workers: int) -> GangTraffic:
    """Bytes that each of the workers sends in one step of the seed's training."""
    sent = step_bytes(
        config.model.family_name, shape, count_parameters(config.model.family_name, shape, vocab_size),
        config.submodels.optimizer, sequence_length=config.corpus.sequence_length, gpu=config.pools.low_memory.gpu,
        layout=Layout(replicate=workers), exchange="step")
    return GangTraffic(bytes=sent, sharded=sent, divided=sent, expert=1)


def exchange_flops(config: RunConfig, traffic: GangTraffic, workers: int) -> float:
    """Operations per token that the workers could compute while they exchange gradients; 0 without GPUs, whose speed is known."""
    low = config.pools.low_memory
    seconds = traffic.bytes / NETWORK_BYTES_PER_SECOND if low.gpu else 0.0
    return seconds * workers * PEAK_FLOPS * UTILISATION * low.speed / config.submodels.optimizer.batch_tokens
