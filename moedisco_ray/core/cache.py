"""The limit on the working copies of a machine: what was not used for longest is deleted, never what is not uploaded.

CACHE/runs/NAME-DIGEST/run/               a working copy
used/UNIT          touched when a unit is used: a committed directory, or an attempt at one
uploaded/UNIT      names of the files of an attempt that are uploaded, so that they may be deleted
pins/UNIT          locked while a process uses the unit
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from moedisco_ray.core.manifests import MANIFEST, OBJECTS

LIMIT = "MOEDISCO_CACHE_GB"
"""Environment variable: maximum size of all working copies of a machine (GB); half of the disk if it is not set."""

_RECENT_SECONDS = 600.0
"""Time for which a used unit stays even if no process has pinned it (s): a driver reads what it has just fetched."""


@contextlib.contextmanager
def pinned(home: Path, units: Iterable[str]) -> Iterator[None]:
    """Keep units of a working copy from being deleted until the block ends."""
    with contextlib.ExitStack() as stack:
        for unit in sorted(set(units)):
            file = stack.enter_context(_file(home, "pins", unit).open("a"))
            fcntl.flock(file, fcntl.LOCK_SH)
            _file(home, "used", unit).touch()
        yield


def note_uploaded(home: Path, unit: str, names: Iterable[str]) -> None:
    """Note files of an attempt that are at the URI, by their names below the run directory."""
    with _file(home, "uploaded", unit).open("a", encoding="utf-8") as file:
        file.write("".join(f"{name}\n" for name in names))
    _file(home, "used", unit).touch()


def make_room(folder: Path) -> None:
    """Delete the least recently used units of the working copies in a folder until these fit the limit."""
    homes = [home for home in folder.iterdir() if home.is_dir()]
    sizes = {home: sum(_size(path) for path in (home / "run").rglob("*")) for home in homes}
    over = sum(sizes.values()) - _limit(folder)
    if over <= 0:
        return
    used = sorted((file for home in homes for file in (home / "used").glob("*")), key=_age, reverse=True)
    for file in used:
        if over <= 0 or _age(file) < _RECENT_SECONDS:
            return
        over -= _delete(file.parent.parent, unquote(file.name))


def _delete(home: Path, unit: str) -> int:
    """Delete what is uploaded of a unit, unless a process uses it; returns the bytes."""
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
