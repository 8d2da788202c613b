"""Finished models that commands read: that of a run, or one that was exported."""

from __future__ import annotations

from pathlib import Path

from moedisco_ray.core.errors import REPAIR, RunDirError
from moedisco_ray.core.records.outdated import check_model_up_to_date
from moedisco_ray.core.stages import stage_named
from moedisco_ray.core.store.locations import Location, joined
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_models import WEIGHTS, is_ensemble, verify_model, whole_model
from moedisco_ray.core.store.run_store import RunStore

_MODEL = stage_named("export").directory


def has_finished_model(location: Location) -> bool:
    """Whether a location is a finished run, or the directory of a model that was exported.

    Raises:
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location)
    return _is_model(store) or store.read(f"{_MODEL}/{MANIFEST}") is not None


def finished_model(location: Location, *, ensemble: bool = False) -> Path:
    """Local directory, with verified weights, of the model of a finished run or of an exported model.

    Args:
        location: Directory or URI of the run, or the directory of an exported model.
        ensemble: Whether the model may be an ensemble of sub-models that stay apart.

    Raises:
        CheckpointError: The directory also holds an adapter, or an ensemble.
        DamagedError: A file of the model is damaged.
        RunDirError: The location holds no finished run and no model, or the model is out of date.
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location)
    if _is_model(store):
        check_model_up_to_date("RUN_DIR", location)
        verify_model(store.directory)
        return whole_model("RUN_DIR", store.directory, ensemble=ensemble)
    if not has_finished_model(location):
        raise RunDirError(
            "RUN_DIR", str(location), "holds no finished model; name a finished run, or what `moedisco export` wrote"
        )
    check_model_up_to_date("RUN_DIR", joined(location, _MODEL))
    model = store.directory / _MODEL
    if store.is_remote:
        store.fetch(model)
    else:
        verify_model(model, REPAIR)
    return whole_model("RUN_DIR", model, ensemble=ensemble)


def _is_model(store: RunStore) -> bool:
    return not store.is_remote and (any(store.directory.glob(f"*{WEIGHTS}")) or is_ensemble(store.directory))
