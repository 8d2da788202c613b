"""Names and files of data sets, and the hash that identifies their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from moedisco_ray.core.store.locations import Location

NAME_PATTERN = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Regular expression of a data set's name."""
HASH_PATTERN = "[0-9a-f]{64}"
"""Regular expression of a SHA-256 in hexadecimal digits."""
MOST_FILES = 10_000
"""Maximum number of files of a data set."""
MOST_BYTES = 2**50
"""Maximum size of a file (bytes); larger than any disk, and small enough for every column."""
LONGEST_PATH = 1024
_LONGEST_PART = 255
"""Maximum size of a file's name on Linux (bytes)."""


class DatasetFile(NamedTuple):
    """A file of a data set: its path, its size (bytes) and the SHA-256 of its content."""

    path: str
    bytes: int
    sha256: str


def hash_of(files: Iterable[DatasetFile]) -> str:
    """SHA-256 of the sorted list of files, which identifies the content of a data set; its name does not count."""
    listed = json.dumps(sorted(files), separators=(",", ":"))
    return hashlib.sha256(listed.encode()).hexdigest()


def reference(name: str, digest: str) -> str:
    """How a stored configuration names a data set, without `dataset://`."""
    return f"{name}@sha256:{digest}"


def hash_in(text: str) -> str | None:
    """The hash in the text of `reference`; None if it has none."""
    return text.partition("@sha256:")[2] or None


def path_mistake(path: str) -> str | None:
    """What is wrong with the path of a file in a data set; None if it is a plain relative path."""
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "must be a relative path without empty parts, '.' and '..'"
    if any(part.startswith(".") for part in parts):
        return "has a part that begins with a dot; runs read no hidden files"
    if "\\" in path or not path.isprintable():
        return "has a backslash or a character that cannot be printed"
    if len(path) > LONGEST_PATH or any(len(part.encode()) > _LONGEST_PART for part in parts):
        return f"is longer than {LONGEST_PATH} characters, or has a name of more than {_LONGEST_PART} bytes"
    return None


def clash(paths: Iterable[str]) -> str | None:
    """A path that occurs twice, or that is also a folder of another path; None if there is none."""
    known: set[str] = set()
    for path in sorted(paths, key=lambda each: each.split("/")):
        parts = path.split("/")
        if any("/".join(parts[:count]) in known for count in range(1, len(parts) + 1)):
            return path
        known.add(path)
    return None


def store_in(home: Path) -> Path:
    """Folder of the data sets below a folder of homes; it is hidden, so that no run's `output` can be inside it."""
    return home / ".datasets"


def files_in(home: Path, digest: str) -> Path:
    """Folder of the files of the data sets with a hash."""
    return store_in(home) / "files" / digest


def marker_in(home: Path, digest: str) -> Path:
    """File with the URI of a copy of the files of the data sets with a hash."""
    return store_in(home) / "copies" / digest


def found_in(homes: Sequence[Path], digest: str) -> Path | None:
    """The existing folder of the files of the data sets with a hash."""
    return next((folder for home in homes if (folder := files_in(home, digest)).is_dir()), None)


def place_in(homes: Sequence[Path], digest: str) -> Location | None:
    """Where runs read the files of the data sets with a hash: the URI of a copy, or the folder; None if it is gone."""
    for home in homes:
        folder, marker = files_in(home, digest), marker_in(home, digest)
        if folder.is_dir():
            return marker.read_text(encoding="utf-8") if marker.is_file() else folder
    return None
