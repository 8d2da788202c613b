"""Hours and dollars of training, from floating-point operations and the pools' prices.

The reference is one A100-80GB: 312 TFLOP/s in bf16 (its data sheet), of which 35 % are assumed to be reached; a pool's
`speed` scales it. Nothing but training is counted; a comparison adds what a run reads beside it (`compare.accounting`).
"""

from __future__ import annotations

import heapq
from collections import Counter

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import Architecture, LowMemoryPool, Pool
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.policies.placement import Need, NodeType, ranked

PEAK_FLOPS = 312e12
UTILISATION = 0.35


class Cost(BaseModel):
    """What training one stage takes."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    """Of all units together."""
    flops: float
    waves: int
    """How often the pool is filled, when there are more units than it trains at once."""
    hours: float
    """Wall-clock."""
    worker_hours: float
    dollars: float


def flops_per_token(
    parameters: Parameters, architecture: Architecture, sequence_length: int, *, checkpointing: bool,
) -> float:
    """Operations of one training step per token.

    6 N + 12 l h d L (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B), N being the parameters in a token's
    matrix products, l layers, h heads of size d, L the sequence length. Recomputing the forward pass adds a third.
    """
    heads = architecture.num_attention_heads * architecture.head_size
    attention = 12 * architecture.num_hidden_layers * heads * sequence_length
    return (6 * parameters.multiplied + attention) * (4 / 3 if checkpointing else 1)


def training_cost(
    flops_each_token: float, tokens: int, pool: Pool, *, units: int = 1, at_once: int = 1, workers_per_unit: int = 1,
) -> Cost:
    """Cost of training `units` models that share `tokens` evenly.

    Args:
        flops_each_token: Operations per token.
        tokens: Of all units together.
        pool: Gives speed and price.
        units: Models that train independently.
        at_once: How many of them the pool has room for.
        workers_per_unit: Workers that share one model; an even split of its time is assumed.
    """
    flops = flops_each_token * tokens
    worker_hours = flops / (PEAK_FLOPS * UTILISATION * pool.speed) / 3600
    waves = -(-units // at_once)
    return Cost(
        tokens=tokens, flops=flops, waves=waves, hours=waves * worker_hours / units / workers_per_unit,
        worker_hours=worker_hours, dollars=worker_hours * pool.price_per_hour)


class TypeShare(BaseModel):
    """What one node type of a mixed pool has of a stage."""

    model_config = ConfigDict(frozen=True)

    name: str
    resource: str
    memory_gb: float
    fits: bool
    """Whether a worker of the stage fits it."""
    units: int
    """Models that train on it."""
    worker_hours: float
    dollars: float


def mixed_cost(
    flops_each_token: float, tokens: int, pool: LowMemoryPool, need_gb: float, *, units: int = 1,
) -> tuple[Cost, tuple[TypeShare, ...]]:
    """Cost of training `units` equal models on a mixed pool, each begun where it fits for the least money at that moment.

    Args:
        flops_each_token: Operations per token.
        tokens: Of all units together.
        pool: Its types, one of which holds a unit at least.
        need_gb: Of a worker.
        units: Models that train independently.
    """
    kinds = {kind.key: kind for kind in pool.node_types}
    flops = flops_each_token * tokens
    hours = {key: training_cost(flops_each_token, tokens, kind).worker_hours / units for key, kind in kinds.items()}
    begun, makespan = _schedule(_slots(pool, kinds, need_gb), hours, units)
    shares = tuple(
        TypeShare(
            name=each.name, resource=each.resource, memory_gb=each.memory_gb, fits=each.memory_gb >= need_gb, units=begun[key],
            worker_hours=begun[key] * hours[key], dollars=begun[key] * hours[key] * each.price_per_hour)
        for key, each in zip(kinds, pool.types, strict=True))
    at_once = min(pool.max_workers, sum(each.max_workers for each in pool.types if each.memory_gb >= need_gb))
    cost = Cost(
        tokens=tokens, flops=flops, waves=-(-units // at_once), hours=makespan,
        worker_hours=sum(share.worker_hours for share in shares), dollars=sum(share.dollars for share in shares))
    return cost, shares


def _slots(pool: LowMemoryPool, kinds: dict[str, LowMemoryPool], need_gb: float) -> dict[str, int]:
    """Slots of each type that equal units use, in the order in which they are filled."""
    order = ranked(Need("", need_gb), [
        NodeType(key, kind.memory_gb, kind.price_per_hour, kind.speed, free=kind.max_workers) for key, kind in kinds.items()])
    slots, left = {}, pool.max_workers
    for each in order:
        slots[each.name] = min(each.free, left)
        left -= slots[each.name]
    return {key: count for key, count in slots.items() if count}


def _schedule(slots: dict[str, int], hours: dict[str, float], units: int) -> tuple[Counter[str], float]:
    """Units begun on each type, and the hours until the last one ends.

    Equal units that begin on the same type at the same time end at the same time: they are one entry. Since cheaper slots are taken
    first, the next units take the slots that were freed. Steps are as many as there are waves of each type.

    Args:
        slots: By type, in the order in which they are filled.
        hours: Of one unit, by type.
        units: At least 1.
    """
    begun: Counter[str] = Counter()
    free = [(0.0, key) for key in reversed(slots)]
    ends: list[tuple[float, str]] = []
    makespan = 0.0
    while units:
        now, key = free.pop() if free else heapq.heappop(ends)
        count = min(slots[key], units)
        begun[key] += count
        units -= count
        makespan = max(makespan, now + hours[key])
        heapq.heappush(ends, (now + hours[key], key))
    return begun, makespan
