"""Paths and URIs of runs, and the directory of a run's files on this machine.

A URI may end with options of its file system, such as `s3://bucket/folder?endpoint_override=HOST:PORT&scheme=http`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from moedisco_ray.core.store.hub import hub_folder, is_hub

Location = Path | str
"""A local path, or a URI."""

CACHE = "MOEDISCO_CACHE_DIR"
"""Environment variable: folder in which this package stores files on a machine, such as working copies of runs at a
URI."""

CORPUS = "corpus"
"""Folder of the corpus, in a run directory and in a data owner's storage."""

_UNUSUAL = re.compile(r"[^A-Za-z0-9._-]")


def joined(location: Location, *parts: str) -> Location:
    """Join a location with names of folders and files below it; a URI's options stay at the end of the result."""
    if not is_uri(location):
        return Path(location).absolute().joinpath(*parts)
    place, sign, options = str(location).partition("?")
    return "/".join([place.rstrip("/"), *parts]) + sign + options


def owned_location(storage: Location, name: str, run_id: str) -> Location:
    """Folder of a run, by its name and id, in the storage of a data owner."""
    return joined(storage, f"{name}-{run_id[:12]}")


def parent(location: Location) -> tuple[Location, str]:
    """The folder that contains a location, and the location's name in it; a URI's options stay at the folder's end."""
    if not is_uri(location):
        path = Path(location).absolute()
        return path.parent, path.name
    place, sign, options = str(location).partition("?")
    folder, _, name = place.rstrip("/").rpartition("/")
    return folder + sign + options, name


def is_uri(location: Location) -> bool:
    """Whether a location is a URI, not a local path."""
    return isinstance(location, str) and "://" in location


def cache_directory() -> Path:
    """Folder of this package's files on a machine: MOEDISCO_CACHE_DIR, else `moedisco` in the user's cache folder."""
    named = os.environ.get(CACHE)
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named).absolute() if named else Path(user) / "moedisco"


def settings_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Folder of the user's own settings, such as the address and token of the service that commands use."""
    home = environment.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "moedisco"


def working_directory(location: Location) -> Path:
    """Local directory of a run's files: the location itself if it is a path, or the working copy of a run at a URI.

    URIs that differ only in their options have the same working copy.
    """
    if not is_uri(location):
        return Path(location)
    place = str(location).partition("?")[0].rstrip("/")
    digest = hashlib.sha256(place.encode()).hexdigest()[:16]
    return cache_directory() / "runs" / f"{_UNUSUAL.sub('_', place.rpartition('/')[2])}-{digest}" / "run"


def local_copies(location: Location) -> list[Path]:
    """Where the files of a location may be on this machine.

    A path is there itself, a URI as a run or as a part of a run, and a model of the Hugging Face hub in the hub's
    cache.
    """
    if isinstance(location, str) and is_hub(location):
        return [hub_folder(location)]
    if not is_uri(location):
        return [Path(location)]
    run, part = parent(location)
    return [working_directory(location), working_directory(run) / part]


def first_line(error: Exception) -> str:
    """The first line of an error's text, shortened for use in a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
