"""Limit the size of a machine's working copies by deleting files that are also stored at their run's URI.

The least recently used unit is deleted first. A unit is a committed directory, or the files of one attempt to write a
directory. The folder `CACHE/runs/NAME-DIGEST` of a run has these parts:

    run/               the working copy
    used/UNIT          an empty file; its modification time is the time of the unit's last use
    uploaded/UNIT      names of an attempt's uploaded files, which may be deleted
    pins/UNIT          locked while a process uses the unit
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from moedisco_ray.core.store.artifacts import write_text
from moedisco_ray.core.store.manifests import MANIFEST, OBJECTS

LIMIT = "MOEDISCO_CACHE_GB"
"""Environment variable: maximum total size of a machine's working copies (GB); if it is not set, half of the disk."""

RECENT_SECONDS = 600.0
"""Time after its last use for which a unit is kept, even if no process has pinned it (s): a driver may still read its
files."""


@contextlib.contextmanager
def pinned(home: Path, units: Iterable[str]) -> Iterator[None]:
    """Prevent units (parts of a working copy) from being deleted until the block ends."""
    with contextlib.ExitStack() as stack:
        for unit in sorted(set(units)):
            file = stack.enter_context(_file(home, "pins", unit).open("a"))
            fcntl.flock(file, fcntl.LOCK_SH)
            _file(home, "used", unit).touch()
        yield


def note_uploaded(home: Path, unit: str, names: Iterable[str]) -> None:
    """Record the names of uploaded files, relative to the run directory: their local copies may be deleted."""
    with _file(home, "uploaded", unit).open("a", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in names))
    _file(home, "used", unit).touch()


def record(home: Path, directory: str, content: bytes) -> None:
    """Record the manifest of the committed directory that a working copy has."""
    path = _record_path(home, directory)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content.decode())


def recorded(home: Path, directory: str) -> bytes | None:
    """The manifest of the committed directory that a working copy has; None if it has none."""
    path = _record_path(home, directory)
    return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def locked(home: Path, name: str) -> Iterator[None]:
    """Prevent other processes of this machine from changing a part of a working copy until the block ends."""
    path = home / "locks" / hashlib.sha256(name.encode()).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_room(folder: Path) -> None:
    """Delete the least recently used units of a folder's working copies until their total size is within the limit."""
    homes = [home for home in folder.iterdir() if home.is_dir()]
    over = sum(_size(path) for home in homes for path in (home / "run").rglob("*")) - _limit(folder)
    if over <= 0:
        return
    used = sorted((file for home in homes for file in (home / "used").glob("*")), key=_age, reverse=True)
    for file in used:
        if over <= 0 or _age(file) < RECENT_SECONDS:
            return
        over -= _delete(file.parent.parent, unquote(file.name))


def _delete(home: Path, unit: str) -> int:
    """Delete the local copies of a unit's uploaded files unless a process uses the unit; return the bytes freed."""
    with _file(home, "pins", unit).open("a") as pin:
        try:
            fcntl.flock(pin, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0
        listed = _file(home, "uploaded", unit)
        if unit.startswith(f"{OBJECTS}/"):
            names = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
            paths = {home / "run" / name for name in names}
        else:
            paths = {path for path in (home / "run" / unit).rglob("*") if path.is_file() and path.name != MANIFEST}
        freed = sum(map(_size, paths))
        for path in paths:
            path.unlink(missing_ok=True)
        listed.unlink(missing_ok=True)
        _file(home, "used", unit).unlink(missing_ok=True)
        return freed


def _record_path(home: Path, directory: str) -> Path:
    return home / "records" / f"{hashlib.sha256(directory.encode()).hexdigest()[:16]}.json"


def _limit(folder: Path) -> int:
    named = os.environ.get(LIMIT)
    return int(float(named) * 1e9) if named else shutil.disk_usage(folder).total // 2


def _file(home: Path, kind: str, unit: str) -> Path:
    path = home / kind / quote(unit, safe="")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _age(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    return found.st_size if path.is_file() else 0
