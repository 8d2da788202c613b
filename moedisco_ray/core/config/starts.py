"""What is decided and recorded before a run begins: commit of a start at the hub, family, and number of clusters."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.places import Place, ReadsFrom, with_places
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.store.hub import HUB, is_hub, is_hub_name
from moedisco_ray.core.store.run_store import RunStore


def with_hub_names(config: RunConfig) -> RunConfig:
    """The configuration with `hf://ORG/NAME` for each start ORG/NAME, unless there is a directory of this name."""

    def change(place: Place) -> str | Path:
        named = isinstance(place.marker, ReadsFrom) and place.marker.hub and is_hub_name(place.value)
        return HUB + str(place.value) if named and not os.path.exists(place.value) else place.value  # noqa: PTH110  # no error either

    return with_places(config, change)


def pinned(config: RunConfig) -> RunConfig:
    """The configuration with the commit of a start at the hub: the one that the run has recorded, or else the newest.

    Raises:
        CheckpointError: The hub has no such model, or cannot be reached.
        StorageError: The run is at a URI that does not respond.
    """
    if not _waits_for_a_commit(config):
        return config
    recorded = _recorded_commit(config)
    return at_newest(config) if recorded is None else _with_commit(config, recorded)


def with_recorded_count(config: RunConfig) -> RunConfig:
    """The configuration with the number of clusters that the run recorded for `auto`, which stays when pools change.

    Raises:
        StorageError: The run is at a URI that does not respond.
    """
    before = _recorded(config) if config.clusters.count == "auto" else None
    if (
        before is None
        or before.clusters.count == "auto"
        or config.model.architecture.num_experts % before.clusters.count
    ):
        return config
    return config.model_copy(update={"clusters": config.clusters.model_copy(update={"count": before.clusters.count})})


def at_newest(config: RunConfig) -> RunConfig:
    """Like `pinned`, without a look at the run's record.

    Raises:
        CheckpointError: The hub has no such model, or cannot be reached.
    """
    init = config.model.init
    return (
        _with_commit(config, init.directory.name)
        if isinstance(init, LocalInit) and _waits_for_a_commit(config)
        else config
    )


def settled(config: RunConfig) -> RunConfig:
    """Like `pinned`, with the number of clusters that the run has recorded, and with the family that the start decides.

    Raises:
        CheckpointError: No model can be read, or no family can start from it.
        StorageError: The run is at a URI that does not respond.
    """
    config = with_recorded_count(pinned(config))
    if not isinstance(config.model.init, LocalInit):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"family": config.model.family_name})})


def _waits_for_a_commit(config: RunConfig) -> bool:
    init = config.model.init
    return isinstance(init, LocalInit) and is_hub(init.place) and init.commit is None


def _with_commit(config: RunConfig, commit: str) -> RunConfig:
    init: LocalInit = config.model.init.model_copy(update={"commit": commit})  # type: ignore[union-attr]  # checked by the callers
    return config.model_copy(update={"model": config.model.model_copy(update={"init": init})})


def _recorded(config: RunConfig) -> RunConfig | None:
    """The `config.json` of the same run; None if it has not begun, or if its version cannot be read."""
    try:
        return stored_config(json.loads(RunStore.of(config.location).read("config.json") or b"{}"))
    except (ValidationError, ValueError):
        return None  # no run yet, or a file that cannot be read; the pipeline reports that when it begins


def _recorded_commit(config: RunConfig) -> str | None:
    """The commit that the run began with, if it was asked for the same model and revision."""
    before, asked = _recorded(config), config.model.init
    if before is None or not isinstance(before.model.init, LocalInit) or not isinstance(asked, LocalInit):
        return None
    return before.model.init.commit if _asked(before.model.init) == _asked(asked) else None


def _asked(init: LocalInit) -> tuple[str, str, str | None]:
    return init.KEY, str(getattr(init, init.KEY)), init.revision
