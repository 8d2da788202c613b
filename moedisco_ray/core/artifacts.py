"""The run directory: its layout, and the atomic commit of a stage's result.

RUN_DIR/
├── config.json      the resolved configuration
├── run.json         the run's id, made once
├── events.jsonl     all events, in order
├── report.json      the final report
├── ray.log          Ray's output
├── corpus/          tokenizer/, train/ and validation/ documents (Parquet), shards/ (packed tokens)
├── seed/            the common dense model that all sub-models start from (a Hugging Face directory)
├── clusters/        the fitted cluster model, assignments/, shards/0..E-1/, report.json
├── decomposed/      backbone/: the tensors that all sub-models share; 0..E-1/: the experts of each, before training
├── submodels/       0..E-1/: the trained sub-models (Hugging Face directories); common/: the backbone of the last sync
├── merged/          the MoE before its fine-tune, and merge.json: the origin of each tensor
├── finetuned/       the MoE after its fine-tune
├── evaluation/      evaluation.json
├── model/           the finished Hugging Face directory
└── checkpoints/     checkpoints of running trainings, deleted when their stage is finished

E is the number of sub-models. Every committed directory holds a `manifest.json`. A directory without one is unfinished and is made
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from moedisco_ray.core.errors import DiskFullError

_PACKAGES = ("moedisco-ray", "ray", "torch", "transformers", "numpy", "scikit-learn", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a committed artifact.

    Attributes:
        fingerprint: Digest of everything the artifact depends on.
        seconds: Wall-clock seconds that it took to make the artifact.
        summary: The stage's figures for the report.
        versions: Versions of the packages that made the artifact.
        created: Time at which the artifact was made, in seconds since the epoch.
    """

    fingerprint: str
    seconds: float
    summary: dict[str, Any]
    versions: dict[str, str]
    created: float


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a committed directory; None if it has no valid manifest."""
    try:
        return parse_manifest((directory / "manifest.json").read_bytes())
    except OSError:
        return None


def parse_manifest(content: bytes) -> Manifest | None:
    """The manifest in a file's content; None if it is not valid."""
    try:
        values = json.loads(content)
        return Manifest(**{name: values[name] for name in values if name != "objects"})
    except (ValueError, TypeError):
        return None


def is_done(directory: Path, fingerprint: str) -> bool:
    """Whether the directory holds a committed artifact with this fingerprint."""
    manifest = read_manifest(directory)
    return manifest is not None and manifest.fingerprint == fingerprint


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
        """Write the manifest into the draft, and rename the draft to `directory`."""
        write_json(draft / "manifest.json", manifest)
        # A directory cannot replace a non-empty one, so the old one is renamed first.
        aside = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        if directory.exists():
            directory.rename(aside)
        draft.rename(directory)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def commit(directory: Path, fingerprint: str, store: Committing = OnDisk()) -> Iterator[Draft]:  # noqa: B008  # it has no state
    """Create a directory atomically: the block writes into `draft.path`, which replaces `directory` when the block succeeds.

    After an error the draft is deleted, and the old directory stays.

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
            manifest = Manifest(fingerprint, round(time.time() - started, 3), draft.summary, versions(), time.time())
            store.replace(draft.path, directory, dataclasses.asdict(manifest))
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)   # on success, the draft was moved and no longer exists


@contextlib.contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn the operating system's error for a full disk into a `DiskFullError`.

    Raises:
        DiskFullError: The block ran out of space.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path) from error
        raise


def disk_full(path: Path) -> DiskFullError:
    """The error for a full file system."""
    return DiskFullError("output", str(path), "the disk is full; free some space and run the command again")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically: a reader sees the old file or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def run_id(directory: Path, given: str | None = None) -> str:
    """The id of the run in a directory, stored in `run.json`; runs with the same name have different ids.

    Args:
        directory: The run directory.
        given: Id to store if the run has none yet; random by default.
    """
    path = directory / "run.json"
    if not path.exists():
        write_json(path, {"id": given or uuid.uuid4().hex})
    return str(read_json(path)["id"])


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))

