"""What is read before a run begins: commit, family and sizes of its start, and what the run itself has recorded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.places import Place, ReadsFrom, with_places
from moedisco_ray.core.config.pool import Pool
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.store.hub import HUB, is_hub, is_hub_name
from moedisco_ray.core.store.run_store import RunStore


def with_hub_names(config: RunConfig) -> RunConfig:
    """The configuration with `hf://ORG/NAME` for each start ORG/NAME, unless there is a directory of this name."""

    def change(place: Place) -> str | Path:
        named = isinstance(place.marker, ReadsFrom) and place.marker.hub and is_hub_name(place.value)
        if not named or os.path.exists(place.value):  # noqa: PTH110 - it also returns False for an invalid name
            return place.value
        return HUB + str(place.value)

    return with_places(config, change)


def looked_up(config: RunConfig, *, recorded: bool) -> RunConfig:
    """The configuration with commit, family and sizes of its start, and with the clusters and the way of its record.

    Args:
        config: The configuration.
        recorded: Whether to look at the run's own record, whose commit, clusters and way stay when the hub or the pools
            change; otherwise the commit is the newest, and `auto` and `recipe` stay.

    Raises:
        CheckpointError: The hub has no such model or cannot be reached, or no family can start from the model.
        ConfigError: A setting contradicts the start.
        StorageError: The run is at a URI that does not respond.
    """
    init, before = config.model.init, _recorded(config) if recorded and is_open(config) else None
    if isinstance(init, LocalInit):
        if is_hub(init.place) and init.commit is None:
            commit = _recorded_commit(init, before) or start_directory(init).name
            init = init.model_copy(update={"commit": commit})
        model = with_start(config.model.model_copy(update={"init": init}))
        config = changed(config, {"model": model.model_dump()})
    return config if before is None else with_recorded_way(_with_recorded_count(config, before), before)


def is_open(config: RunConfig) -> bool:
    """Whether something is decided when a run begins, and recorded: the commit of a start, the clusters, or the way."""
    init = config.model.init
    waits_for_a_commit = isinstance(init, LocalInit) and is_hub(init.place) and init.commit is None
    return waits_for_a_commit or config.clusters.count == "auto" or config.recipe is not None


def changed(config: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The configuration with other settings in some sections, checked with all others.

    Raises:
        ConfigError: The settings do not go with the others.
    """
    # Sections that stay are passed as they are: checking long lists of sources again for each plan takes seconds.
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    for name, values in changes.items():
        sections[name] = sections[name].model_dump() | dict(values)
    try:
        return RunConfig.model_validate(sections)
    except ValidationError as error:
        raise first_mistake(error.errors()) from error


def _with_recorded_count(config: RunConfig, before: RunConfig) -> RunConfig:
    """The configuration with the number of clusters that the run recorded for `auto`, which stays when pools change."""
    count = before.clusters.count
    if config.clusters.count != "auto" or count == "auto" or config.model.architecture.num_experts % count:
        return config
    return config.model_copy(update={"clusters": config.clusters.model_copy(update={"count": count})})


def _kept(pool: Pool, recorded: Pool, *names: str) -> dict[str, Any]:
    """The size of a pool and the place of its weights that a run recorded; `streamed` may be asked for later too."""
    memory = "streamed" if pool.memory == "streamed" else recorded.memory
    return {"memory": memory} | {name: getattr(recorded, name) for name in names}


def with_recorded_way(config: RunConfig, before: RunConfig) -> RunConfig:
    """The configuration with the way to train that the run recorded for `recipe`, which stays when pools change."""
    if config.recipe is None or before.recipe is not None:
        return config
    low, high, recorded = config.pools.low_memory, config.pools.high_memory, before.pools
    if before.finetune.pool == "high_memory":
        high = high.model_copy(update=_kept(high, recorded.high_memory, "workers"))
    elif low.types:
        low = recorded.low_memory  # one of the types
    else:
        low = low.model_copy(update=_kept(low, recorded.low_memory, "max_workers", "seed_workers"))
    shares = {name: getattr(before.tokens, name) for name in ("seed_share", "finetune_share")}
    by_members = {
        "submodels": before.submodels,
        "clusters": config.clusters.model_copy(update={"count": before.clusters.count}),
        "merge": config.merge.model_copy(update={"router": before.merge.router}),
    }
    return config.model_copy(
        update={
            **(by_members if config.recipe == "members" else {}),
            "recipe": None,
            "tokens": config.tokens.model_copy(update=shares),
            "finetune": config.finetune.model_copy(update={"pool": before.finetune.pool}),
            "pools": config.pools.model_copy(update={"low_memory": low, "high_memory": high}),
        }
    )


def _recorded(config: RunConfig) -> RunConfig | None:
    """The `config.json` of the same run; None if it has not begun, or if its version cannot be read."""
    try:
        return stored_config(json.loads(RunStore.of(config.location).read("config.json") or b"{}"))
    except (ValidationError, ValueError):
        return None  # no run yet, or a file that cannot be read; the pipeline reports that when it begins


def _recorded_commit(asked: LocalInit, before: RunConfig | None) -> str | None:
    """The commit that the run began with, if it was asked for the same model and revision."""
    if before is None or not isinstance(before.model.init, LocalInit):
        return None
    return before.model.init.commit if _asked(before.model.init) == _asked(asked) else None


def _asked(init: LocalInit) -> tuple[str, str, str | None]:
    return init.KEY, str(getattr(init, init.KEY)), init.revision
