"""Verify the files of a committed directory against its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from moedisco_ray.core.artifacts import Manifest, read_manifest
from moedisco_ray.core.checksums import Entry, damaged_files
from moedisco_ray.core.errors import REPAIR, DamagedError
from moedisco_ray.core.manifests import MANIFEST


def damage_in(directory: Path) -> list[str]:
    """Names of the damaged files of a committed directory, which may be its manifest; empty if it has none or no manifest."""
    try:
        manifest = read_manifest(directory)
    except DamagedError:
        return [MANIFEST]
    return [] if manifest is None else damaged_files(directory, manifest.files)


def verify(directory: Path, wanted: Callable[[str], bool] = lambda _: True, remedy: str = REPAIR) -> None:
    """Verify the files of a committed directory; do nothing for a directory without a manifest.

    Args:
        directory: The directory.
        wanted: Whether to verify the file of this name.
        remedy: What the error tells users to do.

    Raises:
        DamagedError: A file, or the manifest, is damaged or missing.
    """
    manifest = read_manifest(directory)
    if manifest is not None:
        files = {name: entry for name, entry in manifest.files.items() if wanted(name)}
        raise_damage(directory, manifest, files, remedy)


def raise_damage(directory: Path, manifest: Manifest, files: Mapping[str, Entry], remedy: str = REPAIR) -> None:
    """Raise a `DamagedError` for the first damaged one of some files of a committed directory."""
    damaged = damaged_files(directory, files)
    if damaged:
        raise DamagedError(f"{directory.name}/{damaged[0]}", manifest.stage, str(directory.parent), remedy)
