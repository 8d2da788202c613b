"""The run directory: its layout, and the atomic commit of a stage's result.

RUN_DIR/
├── config.json      the resolved configuration
├── run.json         the run's id, made once
├── events.jsonl     all events, in order
├── measurements.json  what was measured on the run's cards before it began
├── report.json      the final report
├── ray.log          Ray's output
├── corpus/          tokenizer/, train/ and validation/ documents (Parquet), shards/ (packed tokens)
├── seed/            the common dense model that all sub-models start from (a Hugging Face directory)
├── clusters/        the fitted cluster model, assignments/, shards/0..E-1/, report.json
├── decomposed/      backbone/: the tensors that all sub-models share; 0..E-1/: the experts of each, before training;
│                    experts.json: which experts of a trained MoE they have
├── submodels/       0..E-1/: the trained sub-models (Hugging Face directories); common/: the backbone of the last sync
├── merged/          the MoE before its fine-tune, and merge.json: the origin of each tensor
├── finetuned/       the MoE after its fine-tune
├── evaluation/      evaluation.json
├── model/           the finished Hugging Face directory
└── checkpoints/     checkpoints of running trainings, deleted when their stage is finished

E is the number of sub-models. Every committed directory holds a `manifest.json` with size and SHA-256 of each of its
files, and with a checksum of itself. A directory without one is unfinished and is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from moedisco_ray.core.errors import REPAIR, DamagedError, DiskFullError
from moedisco_ray.core.store.checksums import (
    Entries,
    digest_of,
    entry_of,
    note_entries,
    stored_entries,
    sync,
    with_checksum,
    without_checksum,
)
from moedisco_ray.core.store.manifests import FILES, MANIFEST, entries_of

_PACKAGES = ("moedisco-ray", "ray", "torch", "transformers", "numpy", "scikit-learn", "tokenizers")
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the operating system's errors for a full disk, or a quota on it that is used up."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a committed artifact; that of a training's output has `files` alone.

    Attributes:
        fingerprint: Digest of everything the artifact depends on.
        seconds: Wall-clock seconds that it took to make the artifact.
        summary: The stage's figures for the report.
        versions: Versions of the packages that made the artifact.
        created: Time at which the artifact was made, in seconds since the epoch.
        stage: Stage that made the artifact.
        inputs: One checksum of all files of each earlier artifact from which this one was made, by stage.
        files: Size and SHA-256 of each file, by name.
    """

    fingerprint: str = ""
    seconds: float = 0.0
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    created: float = 0.0
    stage: str = ""
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    files: Entries = dataclasses.field(default_factory=dict)

    @property
    def content(self) -> str:
        """One checksum of all files."""
        return digest_of(self.files)


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_manifest(directory: Path, remedy: str = REPAIR, name: str = "", location: str = "") -> Manifest | None:
    """The manifest of a committed directory; None if it has none.

    Args:
        directory: The directory.
        remedy: What users should do, for the error.
        name: Name of the directory in the location, for the error; by default, its own name.
        location: Directory or URI of the run, for the error; by default, the directory's parent.

    Raises:
        DamagedError: The manifest is damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    return parse_manifest(content, name or directory.name, location or str(directory.parent), remedy)


def parse_manifest(content: bytes | None, name: str, location: str = "", remedy: str = REPAIR) -> Manifest | None:
    """The manifest in a file's content; None if there is no file.

    Args:
        content: Content of the file.
        name: Name of the committed directory.
        location: Directory or URI of the run.
        remedy: What users should do, for the error.

    Raises:
        DamagedError: The manifest is damaged, or of an earlier version without checksums.
    """
    if content is None:
        return None
    try:
        values = without_checksum(content)
        return Manifest(**{**values, FILES: entries_of(values)})
    except (ValueError, TypeError) as error:
        raise DamagedError(f"{name}/{MANIFEST}", "", location, remedy) from error


def is_done(manifest: Manifest | None, fingerprint: str, inputs: Mapping[str, str]) -> bool:
    """Whether an artifact has this fingerprint and was made from these inputs."""
    return manifest is not None and manifest.fingerprint == fingerprint and manifest.inputs == inputs


class Draft:
    """A directory that is not committed yet, and the summary of its stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.summary: dict[str, Any] = {}


class Committing(Protocol):
    """Interface of a storage that commits directories; `OnDisk` and `run_store.RunStore` implement it."""

    def draft(self, directory: Path) -> Path:
        """Path of the draft: the directory in which to write a new version of `directory`."""

    def replace(self, draft: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest into the complete draft, and replace `directory` with the draft."""


class OnDisk:
    """Commits a directory on a disk by renaming its draft."""

    def draft(self, directory: Path) -> Path:
        """Path of the draft: a hidden directory next to `directory`."""
        return directory.with_name(f".{directory.name}.draft")

    def replace(self, draft: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, with a checksum of each file, into the draft, and rename the draft to `directory`.

        After a power cut, the directory has all its files or none: the files are on the disk before the draft is
        renamed.
        """
        write_manifest(draft, {**manifest, FILES: stored_entries(draft)})
        sync(draft)
        replace_directory(draft, directory)
        sync(directory.parent)


def write_manifest(directory: Path, values: Mapping[str, Any]) -> None:
    entries = {name: entry[:2] for name, entry in values[FILES].items()}  # without an object
    write_json(directory / MANIFEST, with_checksum({**values, FILES: entries}))


def amend_manifest(directory: Path, path: Path) -> None:
    """Replace the entry of one file, which was written again, in the manifest of its directory."""
    values = without_checksum((directory / MANIFEST).read_bytes())
    write_manifest(
        directory, {**values, FILES: {**values[FILES], path.relative_to(directory).as_posix(): entry_of(path)}}
    )


def link_directory(source: Path, target: Path, *, notes: bool = True) -> None:
    """Hard-link the files of a finished directory into a draft.

    Args:
        source: The finished directory.
        target: The draft, or a folder in it.
        notes: Whether to note the entries that the directory's manifest has; `stored_entries` takes the notes away.
    """
    shutil.copytree(source, target, copy_function=os.link, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    manifest = read_manifest(source) if notes else None
    if manifest is not None:
        note_entries(target, manifest.files)


def replace_directory(draft: Path, directory: Path) -> None:
    """Rename a draft to its directory."""
    # A directory cannot replace a non-empty one, so the old one is renamed first.
    aside = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
    draft.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def commit(
    directory: Path,
    fingerprint: str,
    store: Committing = OnDisk(),  # noqa: B008  # it has no state
    stage: str = "",
    inputs: Mapping[str, str] | None = None,
) -> Iterator[Draft]:
    """Create a directory atomically: the block fills `draft.path`, which replaces `directory` if the block succeeds.

    After an error the draft is deleted, and the old directory stays.

    Args:
        directory: The directory.
        fingerprint: Digest of everything the artifact depends on.
        store: Where the directory is stored.
        stage: Stage that makes the artifact.
        inputs: Checksum of each artifact from which this one is made; see `Manifest`.

    Raises:
        DiskFullError: The disk is full.
        StorageError: The run's URI does not respond.
    """
    draft = Draft(store.draft(directory))
    shutil.rmtree(draft.path, ignore_errors=True)
    started = time.time()
    try:
        draft.path.mkdir(parents=True)
        with reporting_full_disk(directory):
            yield draft
            manifest = Manifest(
                fingerprint,
                round(time.time() - started, 3),
                draft.summary,
                versions(),
                time.time(),
                stage=stage,
                inputs=dict(inputs or {}),
            )
            store.replace(draft.path, directory, dataclasses.asdict(manifest))
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)  # on success, the draft was moved and no longer exists


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's error for a full disk into a `DiskFullError`.

    Raises:
        DiskFullError: The block ran out of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise disk_full(path) from error
        raise


def disk_full(path: Path) -> DiskFullError:
    return DiskFullError("output", str(path), "the disk is full; free some space and run the command again")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically: a reader sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    sync(draft)  # else a power cut may leave empty pages under the new name
    draft.replace(path)


def run_id(directory: Path, given: str | None = None) -> str:
    """The id of the run in a directory, stored in `run.json`; runs with the same name have different ids.

    Args:
        directory: The run directory.
        given: Id to store if the run has none yet; random by default.

    Raises:
        DamagedError: The file is damaged.
    """
    path = directory / "run.json"
    if not path.exists():
        write_json(path, with_checksum({"id": given or uuid.uuid4().hex}))
    try:
        return str(without_checksum(path.read_bytes())["id"])
    except (OSError, ValueError) as error:
        raise DamagedError(path.name, "", str(directory)) from error


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
