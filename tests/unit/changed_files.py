"""Changes of files in committed directories that tests make on purpose."""

from __future__ import annotations

from pathlib import Path

from moedisco_ray.core.store.artifacts import read_manifest, write_manifest
from moedisco_ray.core.store.checksums import stored_entries, without_checksum


def accept_changes(directory: Path) -> None:
    """Give a committed directory the checksums of its present files."""
    values = without_checksum((directory / "manifest.json").read_bytes())
    (directory / "manifest.json").unlink()
    write_manifest(directory, {**values, "files": stored_entries(directory)})


def accept_as_input(directory: Path) -> None:
    """Let the manifests of a run's later stages, which name their inputs, fit the present files of an earlier stage."""
    before = read_manifest(directory)
    accept_changes(directory)
    after = read_manifest(directory)
    assert before is not None
    assert after is not None
    for path in directory.parent.glob("*/manifest.json"):
        values = without_checksum(path.read_bytes())
        if values["inputs"].get(before.stage) == before.content:
            write_manifest(path.parent, {**values, "inputs": {**values["inputs"], before.stage: after.content}})
