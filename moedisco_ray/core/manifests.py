"""Committed directories at a URI: their manifests, and the transfer of their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from moedisco_ray.core.remote import Remote

MANIFEST = "manifest.json"
LEASE = "lease.json"
CHECKPOINTS, LOGS, OBJECTS, RECEIPTS, STEPS = "checkpoints", "logs", "objects", "receipts", "steps"

_TRANSFERS = 8
"""Simultaneous uploads or downloads of one call: enough to fill a connection of 10 Gbit/s with S3's 100 MB/s per stream."""


class Entry(NamedTuple):
    """A file of a committed directory: its object, size and checksum."""

    object: str
    size: int
    sha256: str


Entries = dict[str, Entry]
"""Files of a directory by name."""


def upload(remote: Remote, files: Iterable[Path], root: Path, prefix: str) -> Entries:
    """Upload files to objects below a prefix.

    Args:
        remote: The run's folder.
        files: Files below `root`.
        root: Directory that the entries' names are relative to.
        prefix: Prefix of the objects.
    """
    def one(path: Path) -> tuple[str, Entry]:
        name = path.relative_to(root).as_posix()
        return name, Entry(f"{prefix}/{name}", *remote.upload(path, f"{prefix}/{name}"))

    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="upload") as threads:
        return dict(threads.map(one, files))


def download(remote: Remote, wanted: Mapping[Path, Entry]) -> None:
    """Download and check files."""
    def one(item: tuple[Path, Entry]) -> None:
        path, entry = item
        remote.download(entry.object, path, entry.size, entry.sha256)

    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="download") as threads:
        list(threads.map(one, wanted.items()))


def attempt_of(name: str) -> str:
    """The folder of an object: `objects/ATTEMPT`."""
    return "/".join(name.split("/")[:2])


def entries_of(content: bytes) -> Entries:
    """The files that a manifest or a receipt lists."""
    return {name: Entry(*entry) for name, entry in json.loads(content).get("objects", {}).items()}


def as_json(value: Any) -> bytes:
    """A value as the content of an object."""
    return (json.dumps(value, indent=1) + "\n").encode()


def files_in(path: Path) -> list[Path]:
    """All files below a directory, or the file itself."""
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def has_size(path: Path, size: int) -> bool:
    """Whether a file exists and has this size."""
    return path.is_file() and path.stat().st_size == size


def is_uploaded(path: Path, draft: Path, entries: Entries) -> bool:
    """Whether a file of a draft is uploaded as it is now."""
    entry = entries.get(path.relative_to(draft).as_posix())
    if entry is None or not has_size(path, entry.size):
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
