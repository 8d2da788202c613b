"""Models that settings name: a directory, or a model that a machine fetches before it reads it.

Such a model is that of a finished run at a URI, or one of the Hugging Face hub. A GGUF file is converted instead.
"""

from __future__ import annotations

from pathlib import Path

from moedisco_ray.core.checksums import Entries
from moedisco_ray.core.errors import CheckpointError, ConfigError, RunDirError
from moedisco_ray.core.gguf_files import gguf_directory, is_gguf
from moedisco_ray.core.hub import hub_parts, is_hub
from moedisco_ray.core.locations import Location, is_uri, parent
from moedisco_ray.core.run_store import RunStore

_WEIGHTS = ".safetensors"
ENSEMBLE_CODE = "modeling_ensemble.py"
"""File of code in the directory of an ensemble, and in no other directory of a model."""


def local_model(setting: str, place: Location, *, weights: bool = True) -> Path:
    """Directory of a model on this machine.

    Args:
        setting: Setting that names the model; errors name it.
        place: A directory, a GGUF file, the URI of a run's model: OUTPUT/NAME/model, or a model of the hub: hf://ORG/NAME@REVISION.
        weights: Whether to fetch the weights too; all other files are always fetched.

    Raises:
        CheckpointError: The URI holds no model of a finished run, the hub has no such model or cannot be reached, or a GGUF file
            cannot be read.
        StorageError: The URI does not respond.
    """
    if is_gguf(place):
        return gguf_directory(setting, Path(place))
    if not is_uri(place):
        return Path(place)
    if is_hub(place):
        from moedisco_ray.core.hub_files import hub_directory  # noqa: PLC0415  # the hub's client takes a moment to import

        return hub_directory(setting, str(place), weights=weights)
    store, name = _store_of(place)
    directory = store.directory / name
    store.fetch(*(directory / each for each in _files(setting, place) if weights or not each.endswith(_WEIGHTS)))
    return directory


def has_finished_model(location: Location) -> bool:
    """Whether a location is a finished run, or the directory of a model that was exported.

    Raises:
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location)
    return _is_model(store) or store.read("model/manifest.json") is not None


def finished_model(location: Location) -> Path:
    """Directory on this machine of the model of a finished run, or of a model that was exported, with its weights.

    Args:
        location: Directory or URI of the run, or the directory of an exported model.

    Raises:
        RunDirError: The location holds no finished run and no model.
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location)
    if _is_model(store):
        return store.directory
    model = store.directory / "model"
    if not has_finished_model(location):
        raise RunDirError(
            "RUN_DIR", str(location), "holds no finished model; name a finished run, or what `moedisco export` wrote")
    store.fetch(model)
    return model


def model_to_push(location: Location) -> Path:
    """Like `finished_model`; the location may also be a directory that `moedisco export --to ensemble` wrote."""
    is_ensemble = not is_uri(location) and (Path(location) / ENSEMBLE_CODE).is_file()
    return Path(location) if is_ensemble else finished_model(location)


def model_identity(setting: str, place: Location) -> str:
    """Names and checksums of the files of a run's model at a URI; of a model of the hub, its name and commit.

    Raises:
        CheckpointError: The URI holds no model of a finished run.
        StorageError: The URI does not respond.
    """
    if is_hub(place):
        return "@".join(map(str, hub_parts(str(place))))
    return "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(_files(setting, place).items()) if name != "README.md")


def model_name(place: Location) -> str:
    """Name of a model for people: its name at the hub, the name of the run that made it, or that of its directory or file."""
    if is_hub(place):
        return hub_parts(str(place))[0]
    folder, name = parent(place)
    return parent(folder)[1] if is_uri(place) and name == "model" else name.removesuffix(".gguf")


def _is_model(store: RunStore) -> bool:
    return not store.is_remote and any(store.directory.glob(f"*{_WEIGHTS}"))


def _files(setting: str, place: Location) -> Entries:
    store, name = _store_of(place)
    try:
        found = store.manifest(name)
    except ConfigError as error:
        raise CheckpointError(setting, str(place), error.remedy) from error
    if found is None or "config.json" not in found:
        raise CheckpointError(setting, str(place), "holds no model of a finished run; name OUTPUT/NAME/model")
    return found


def _store_of(place: Location) -> tuple[RunStore, str]:
    folder, name = parent(place)
    return RunStore.of(folder), name
