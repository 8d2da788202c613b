"""Models that settings name: a directory, or a model that a machine fetches before it reads it.

Such a model is that of a finished run at a URI, or one of the Hugging Face hub. A model file, such as GGUF, is
converted instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.store.checksums import CHECKSUM, Entries
from moedisco_ray.core.store.hub import hub_parts, is_hub
from moedisco_ray.core.store.locations import Location, is_uri, parent
from moedisco_ray.core.store.manifests import FILES, MANIFEST
from moedisco_ray.core.store.model_files import directory_of, model_file
from moedisco_ray.core.store.read_roots import opened
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.verification import Verifier

WEIGHTS = ".safetensors"
_CARD = "README.md"
_AGAIN = f"export it again, or copy it again from where it is intact; if you changed it yourself, remove its {MANIFEST}"
"""Remedy for a damaged model outside of a run."""
ENSEMBLE = "moedisco_ensemble"
"""The `model_type` of an ensemble of sub-models."""
_OURS = frozenset({"stage", FILES, CHECKSUM})
ADAPTER = "adapter_config.json"
"""File that makes transformers apply an adapter when it loads the model in the directory."""


def local_model(setting: str, place: Location, *, weights: bool = True, verifier: Verifier | None = None) -> Path:
    """Directory of a model on this machine.

    Args:
        setting: Setting that names the model; errors name it.
        place: A directory, a model file, the URI of a run's model: OUTPUT/NAME/model, or a model of the hub:
            hf://ORG/NAME@REVISION.
        weights: Whether to fetch the weights too; all other files are always fetched.
        verifier: Verifies the weights of a model that a run wrote; by default a new one, which verifies all of them.

    Raises:
        CheckpointError: The URI holds no model of a finished run, the hub has no such model or cannot be reached, or a
            model file cannot be read.
        DamagedError: The directory is one that a run wrote, and a file in it is damaged.
        StorageError: The URI does not respond.
    """
    verifier = verifier or Verifier()
    if (kind := model_file(place)) is not None:
        return directory_of(setting, Path(place), kind)
    if not is_uri(place):
        if weights:
            verify_model(Path(place), verifier=verifier)
        return Path(place)
    if is_hub(place):
        from moedisco_ray.core.store.hub_files import hub_directory  # noqa: PLC0415 - the client is slow to import

        return hub_directory(setting, str(place), weights=weights)
    store, name = _store_of(place)
    store = dataclasses.replace(store, verifies=not verifier.trusts, attempt=verifier.attempt)
    directory = store.directory / name
    store.fetch(*(directory / each for each in _files(setting, place) if weights or not each.endswith(WEIGHTS)))
    return directory


def verify_model(directory: Path, remedy: str = _AGAIN, verifier: Verifier | None = None) -> None:
    """Verify the directory of a model that a run or an export wrote, except for its card, which people edit.

    Args:
        directory: The directory.
        remedy: Remedy in the error.
        verifier: As in `local_model`.

    Raises:
        DamagedError: A file of the model is damaged.
    """
    with contextlib.suppress(OSError, ValueError):  # a manifest of ours may be damaged
        found = json.loads((directory / MANIFEST).read_bytes())
        if not isinstance(found, dict) or len(_OURS & found.keys()) < len(_OURS) - 1:
            return  # another program's file of this name; no single flipped bit takes two keys from ours
    (verifier or Verifier()).verify(directory, lambda name: name != _CARD, remedy=remedy)


def is_ensemble(directory: Path) -> bool:
    """Whether the directory of a model holds an ensemble of sub-models that were never merged."""
    return _config_of(directory).get("model_type") == ENSEMBLE


def whole_model(setting: str, directory: Path, *, ensemble: bool = False) -> Path:
    """A model's directory, after a check that its weights are the whole model; all commands open models through this.

    transformers applies an adapter in the directory when it loads the model, and other programs ignore it. It also
    fetches and runs a kernel that `config.json` names, if the package `kernels` is installed, even without
    `trust_remote_code`.

    Args:
        setting: Setting that names the model; errors name it.
        directory: The directory.
        ensemble: Whether it may hold an ensemble of sub-models; few commands can open one.

    Raises:
        CheckpointError: The directory also holds an adapter, or its `config.json` names a kernel or an ensemble.
    """
    if is_ensemble(directory):
        if not ensemble:
            raise CheckpointError(
                setting,
                str(directory),
                "holds an ensemble of sub-models that stay apart; name what `moedisco export RUN_DIR --to hf` writes, "
                "which is the model merged from them, or one of the ensemble's folders 0, 1, ...",
            )
        for part in (each.parent for each in directory.glob("*/config.json")):
            whole_model(setting, part)
    if (directory / ADAPTER).exists():
        raise CheckpointError(
            setting,
            str(directory),
            f"holds an adapter of PEFT ({ADAPTER}); merge it into the model first (`merge_and_unload` and "
            "`save_pretrained` of PEFT), or remove it",
        )
    for field in _kernel_fields(directory):
        raise CheckpointError(
            setting,
            str(directory),
            f"names a kernel to fetch and run ({field} of config.json); remove the field if you trust the rest",
        )
    return directory


def _kernel_fields(directory: Path) -> list[str]:
    """Fields of a model's `config.json` that name an implementation in a repository of the hub, as ORG/NAME.

    Files that cannot be read are reported by those who need them.
    """
    return list(_implementations(_config_of(directory)))


def _config_of(directory: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError), opened(directory / "config.json") as path:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}


def _implementations(config: Mapping[str, Any]) -> Iterator[str]:
    for field, value in config.items():
        if "_implementation" in field and "/" in json.dumps(value):
            yield field
        elif isinstance(value, dict):
            yield from _implementations(value)


def model_identity(setting: str, place: Location) -> str:
    """Names and checksums of the files of a run's model at a URI; of a model of the hub, its name and commit.

    Raises:
        CheckpointError: The URI holds no model of a finished run.
        StorageError: The URI does not respond.
    """
    if is_hub(place):
        return "@".join(map(str, hub_parts(str(place))))
    return "".join(
        f"{name} {entry.sha256}\n" for name, entry in sorted(_files(setting, place).items()) if name != _CARD
    )


def model_name(place: Location) -> str:
    """Name of a model for people: its name at the hub, or that of the run that made it, or of its directory or file."""
    if is_hub(place):
        return hub_parts(str(place))[0]
    folder, name = parent(place)
    if is_uri(place) and name == "model":
        return parent(folder)[1]
    return name if model_file(place) is None else Path(name).stem


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
