"""Find the artifacts of a run that do not belong to what the run has now: its settings, and its earlier artifacts.

After a changed setting, the artifacts of later stages stay until the run has made them again. Readers say so, or refuse
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import read_stored_config
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.stages import STAGES, Stage
from moedisco_ray.core.store.artifacts import Manifest, parse_manifest
from moedisco_ray.core.store.hub import is_hub
from moedisco_ray.core.store.locations import Location, is_uri, parent
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_store import RunStore

REMEDY = "`moedisco run` with the run's configuration makes it again"


def outdated_stages(config: RunConfig, manifests: Mapping[str, Manifest]) -> tuple[str, ...]:
    """Stages whose artifacts belong to other settings or earlier artifacts than the run's, and the stages after them.

    Args:
        config: The stored configuration of the run.
        manifests: The manifests of the artifacts that exist, by stage.
    """
    found: list[str] = []
    for stage in STAGES:
        manifest = manifests.get(stage.name)
        if manifest is not None and (
            any(need in found for need in stage.needs)
            or _has_other_inputs(manifest, manifests)
            or _has_other_settings(stage, config, manifest, manifests)
        ):
            found.append(stage.name)
    return tuple(found)


def manifests_of(store: RunStore) -> dict[str, Manifest]:
    """The manifests of a run's artifacts that exist, by stage.

    Raises:
        DamagedError: A manifest is damaged.
        StorageError: The URI does not respond.
    """
    found = {
        stage.name: parse_manifest(store.read(f"{stage.directory}/{MANIFEST}"), stage.directory, str(store.location))
        for stage in STAGES
    }
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def check_up_to_date(argument: str, location: Location, *stages: str) -> None:
    """Check that artifacts of a run are not out of date.

    Args:
        argument: Argument of the command that names the run; errors name it.
        location: Directory or URI of the run.
        stages: Stages whose artifacts are about to be used.

    Raises:
        RunDirError: One of them is out of date.
        DamagedError: A manifest, or the configuration of the run, is damaged.
        StorageError: The URI does not respond.
    """
    store = RunStore.of(location)
    content = store.read("config.json")
    if content is None:
        return
    try:
        config = read_stored_config(content, location)
    except ValidationError:  # a run of another version, whose settings cannot be compared
        return
    outdated = outdated_stages(config, manifests_of(store))
    first = next((stage for stage in stages if stage in outdated), None)
    if first is not None:
        raise RunDirError(
            argument,
            str(location),
            f"its stage {first} is out of date: it was made with other settings, or from other artifacts, "
            f"than the run has now; {REMEDY}",
        )


def check_model_up_to_date(argument: str, place: Location) -> None:
    """Check that the directory or URI of a model is not an outdated artifact of a run; see `check_up_to_date`."""
    if is_hub(place):
        return
    home, name = parent(place if is_uri(place) else Path(place).absolute())
    stage = next((stage for stage in STAGES if stage.directory == name), None)
    if stage is not None and RunStore.of(place).read(MANIFEST) is not None:
        check_up_to_date(argument, home, stage.name)


def _has_other_inputs(manifest: Manifest, manifests: Mapping[str, Manifest]) -> bool:
    return any(name in manifests and manifests[name].content != content for name, content in manifest.inputs.items())


def _has_other_settings(stage: Stage, config: RunConfig, manifest: Manifest, manifests: Mapping[str, Manifest]) -> bool:
    if stage.reads_files(config) or not config.model.known:
        return False  # the fingerprint cannot be computed again; other inputs still show
    if any(need not in manifests for need in stage.needs):
        return False
    expected = stage.fingerprint(config, {need: manifests[need].fingerprint for need in stage.needs})
    return manifest.fingerprint != expected
