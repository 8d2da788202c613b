"""Hours and dollars of training, from floating-point operations and the pools' prices.

The speed of a worker is that of its pool's card (`Pool.flops`), the same for every training on it. Only training is
counted; comparisons add forward passes without training (`compare.accounting`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import Architecture, LowMemoryPool, Optimizer, Pool
from moedisco_ray.core.families import FamilyName
from moedisco_ray.core.records.prices import dollars_of
from moedisco_ray.plan.muon_flops import muon_flops
from moedisco_ray.plan.parameters import Parameters
from moedisco_ray.policies.placement import Need, NodeType, ranked


class Cost(BaseModel, frozen=True, defer_build=True):
    """Cost of the training of one stage."""

    tokens: int
    """Training tokens, summed over units."""
    flops: float
    waves: int
    """Number of rounds in which the pool trains all units; above 1 if it cannot train all of them at the same time."""
    hours: float
    """Wall-clock time in hours."""
    worker_hours: float
    dollars: float


def flops_per_token(
    parameters: Parameters, architecture: Architecture, sequence_length: int, *, checkpointing: bool
) -> float:
    """Floating-point operations of a training step per token.

    6 N + 12 l h d L (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B), N being the parameters in a token's
    matrix products, l layers with attention, h heads of size d, L the sequence length. Recurrent layers add three times
    the operations of their recurrence in a forward pass. Gradient checkpointing adds a third.
    """
    heads = architecture.num_attention_heads * architecture.head_size
    layers = architecture.num_hidden_layers - parameters.recurrent_layers
    mixing = 12 * layers * heads * sequence_length + 3 * parameters.recurrence_flops
    return (6 * parameters.multiplied + mixing) * (4 / 3 if checkpointing else 1)


def training_cost(
    flops_each_token: float,
    tokens: int,
    pool: Pool,
    *,
    experts: int,
    units: int = 1,
    at_once: int = 1,
    workers_per_unit: int = 1,
    owned: Sequence[float] = (),
) -> Cost:
    """Cost of training `units` models that share the tokens evenly.

    Args:
        flops_each_token: Operations per token.
        tokens: Training tokens, summed over units.
        pool: The pool, with speed and price.
        experts: Experts per layer.
        units: Number of models that train independently.
        at_once: Number of models that train at the same time.
        workers_per_unit: Number of workers per model; they divide its time evenly.
        owned: Price of each data owner's seat ($/h). Each trains one of the models, at the pool's speed.
    """
    flops = flops_each_token * tokens
    worker_hours = flops / pool.flops(experts) / 3600
    waves = -(-units // at_once)
    unit_seconds = 3600 * worker_hours / units
    pool_dollars = dollars_of(unit_seconds * (units - len(owned)), pool.price_per_hour)
    return Cost(
        tokens=tokens,
        flops=flops,
        waves=waves,
        hours=waves * worker_hours / units / workers_per_unit,
        worker_hours=worker_hours,
        dollars=sum([pool_dollars, *(dollars_of(unit_seconds, price) for price in owned)]),
    )


def optimizer_flops_per_token(
    family: FamilyName, architecture: Architecture, optimizer: Optimizer, pool: Pool, *, replicas: int = 1
) -> float:
    """Floating-point operations of an optimizer's step on GPUs per token of its batch; only Muon has many.

    Muon's operations do not depend on the batch, and need all experts, so they count where batches are small, or few
    experts are active. They are large dense products: they run at the speed of dense models, and are expressed as
    operations at the speed of the model at hand.

    Args:
        family: The model's family.
        architecture: Sizes of the model.
        optimizer: Settings of the optimizer.
        pool: Pool that trains.
        replicas: Number of replicas; each computes all of them, and the workers of one replica share them.
    """
    if optimizer.name != "muon" or not pool.gpu:
        return 0.0
    at_dense_speed = pool.flops(architecture.num_experts) / pool.flops(1)
    return replicas * muon_flops(family, architecture) * at_dense_speed / optimizer.batch_tokens


class TypeShare(BaseModel, frozen=True, defer_build=True):
    """The part of a stage on one node type of a mixed pool."""

    name: str
    resource: str
    memory_gb: float
    fits: bool
    """Whether this node type has enough memory for a worker of the stage."""
    units: int
    """Number of models that train on this node type."""
    worker_hours: float
    dollars: float


def mixed_cost(
    flops_each_token: float,
    tokens: int,
    pool: LowMemoryPool,
    need_gb: float,
    *,
    experts: int,
    units: int = 1,
    owned: Sequence[float] = (),
) -> tuple[Cost, tuple[TypeShare, ...]]:
    """Cost of training `units` equal models on a mixed pool, each on the cheapest free node type with enough memory.

    The shares leave out the models of data owners, which train on seats of their own.

    Args:
        flops_each_token: Operations per token.
        tokens: Training tokens, summed over units.
        pool: The pool; at least one of its node types has enough memory.
        need_gb: Memory of a worker (GiB).
        experts: Experts per layer.
        units: Number of models that train independently.
        owned: Price of each data owner's seat ($/h). Each trains one of the models, at the pool's own speed.
    """
    kinds = {kind.key: kind for kind in pool.node_types}
    flops = flops_each_token * tokens
    hours = {key: flops / kind.flops(experts) / 3600 / units for key, kind in kinds.items()}
    own_hours = flops / pool.flops(experts) / 3600 / units if owned else 0.0
    begun, makespan = _schedule(_slots(pool, kinds, need_gb), hours, units - len(owned))
    shares = tuple(
        TypeShare(
            name=each.name,
            resource=each.resource,
            memory_gb=each.memory_gb,
            fits=each.memory_gb >= need_gb,
            units=begun[key],
            worker_hours=begun[key] * hours[key],
            dollars=dollars_of(3600 * begun[key] * hours[key], each.price_per_hour),
        )
        for key, each in zip(kinds, pool.types, strict=True)
    )
    at_once = min(pool.max_workers, sum(each.max_workers for each in pool.types if each.memory_gb >= need_gb))
    cost = Cost(
        tokens=tokens,
        flops=flops,
        waves=-(-(units - len(owned)) // at_once),
        hours=max(makespan, own_hours),
        worker_hours=sum(share.worker_hours for share in shares) + own_hours * len(owned),
        dollars=sum(share.dollars for share in shares) + sum(dollars_of(3600 * own_hours, each) for each in owned),
    )
    return cost, shares


def _slots(pool: LowMemoryPool, kinds: dict[str, LowMemoryPool], need_gb: float) -> dict[str, int]:
    """Number of slots of each node type that equal units fill, best node type first."""
    order = ranked(
        Need("", need_gb),
        [
            NodeType(key, kind.memory_gb, kind.price_per_hour, kind.speed, free=kind.max_workers)
            for key, kind in kinds.items()
        ],
    )
    slots, left = {}, pool.max_workers
    for each in order:
        slots[each.name] = min(each.free, left)
        left -= slots[each.name]
    return {key: count for key, count in slots.items() if count}


def _schedule(slots: dict[str, int], hours: dict[str, float], units: int) -> tuple[Counter[str], float]:
    """Number of units on each node type, and the hours until the last unit ends.

    Equal units that start on one node type at the same time also end at the same time, so the heap has one entry for
    all of them. The loop has one iteration per wave of each node type.

    Args:
        slots: Slots by type, best type first.
        hours: Hours of one unit, by type.
        units: Number of units, at least 1.
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
