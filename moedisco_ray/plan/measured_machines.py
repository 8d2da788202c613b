"""Speed and free memory of cards, and the network, as `moedisco doctor` measured them, instead of what is assumed."""

from __future__ import annotations

import time

from moedisco_ray.core.config import AnyPool, LowMemoryPool, Pool, RunConfig
from moedisco_ray.core.records.measurements import Measurements, stored_measurements
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.parameters import submodel_architecture

_GIGABIT = 1e9 / 8


def with_stored_measurements(config: RunConfig, place: str) -> tuple[RunConfig, dict[str, str]]:
    """Use the newest measurements of a place, if there are any; see `with_measurements`.

    Raises:
        ConfigError: The measurements cannot be read.
    """
    found = stored_measurements(place)
    return (config, {}) if found is None else with_measurements(config, found, time.time())


def with_measurements(config: RunConfig, found: Measurements, now: float) -> tuple[RunConfig, dict[str, str]]:
    """Replace assumptions about the pools with what was measured: speed and free memory of cards, network of nodes.

    More free memory than the configuration allows changes nothing.

    Args:
        config: The configuration.
        found: The measurements.
        now: The current time (s since the epoch).

    Returns:
        The configuration, and how the speed of each pool was measured, in words, by the pool's or node type's key.
    """
    counted = with_cluster_count(config)
    whole = counted.model.architecture
    part = submodel_architecture(counted.model.family_name, whole, counted.cluster_count)
    experts = {"low_memory": part.num_experts, "high_memory": whole.num_experts}
    pools, words = dict[str, AnyPool](), dict[str, str]()
    for pool in (config.pools.low_memory, config.pools.high_memory):
        of_types = {each.resource: _of_cards(each, found, experts[pool.name]) for each in pool.node_types if each.gpu}
        for each in pool.node_types:
            changes = of_types.get(each.resource, {})
            if "speed" in changes:
                lower = f", with {changes['memory_gb']:.1f} GiB free" if "memory_gb" in changes else ""
                words[each.key] = f"by moedisco doctor {found.age(now)}{lower}"
        if isinstance(pool, LowMemoryPool) and pool.types:
            kinds = tuple(kind.model_copy(update=of_types.get(kind.resource, {})) for kind in pool.types)
            changed: AnyPool = pool.model_copy(update={"types": kinds})
        else:
            changed = pool.model_copy(update=of_types.get(pool.resource, {}))
        exchange = [rate for each in pool.node_types if (rate := found.exchange(each, "between")) is not None]
        pools[pool.name] = changed.model_copy(update={"network": min(exchange) / _GIGABIT} if exchange else {})
    return config.model_copy(update={"pools": config.pools.model_copy(update=pools)}), words


def _of_cards(pool: Pool, found: Measurements, experts: int) -> dict[str, float]:
    """The measured `speed` and `memory_gb` of a pool's cards, or of a node type's."""
    flops, free = found.flops(pool, experts), found.free_gib(pool)
    changes = {} if flops is None else {"speed": pool.speed * flops / pool.flops(experts)}
    return changes if free is None or free >= pool.memory_gb else changes | {"memory_gb": free}
