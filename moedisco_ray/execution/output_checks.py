"""Checks that a run can write to its output and its checkpoint storage, and that their disks have room.

Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DiskFullError, RunDirError, UserError
from moedisco_ray.core.store.locations import is_uri
from moedisco_ray.plan import Plan

_GB = 2**30
_TIGHT = 1.2
"""Factor on the planned bytes below which the room counts as scarce: logs, figures and temporary files are not
planned."""


def check_output(directory: Path, field: str = "output") -> None:
    """Check that a directory can be created, or written if it exists, by writing a byte there and removing it.

    Args:
        directory: The directory.
        field: Setting or option that names it, for errors.

    Raises:
        RunDirError: The directory cannot be created or written.
    """
    existing = _existing(directory)
    if not existing.is_dir():
        raise RunDirError(field, str(directory), f"cannot be made: {existing} is not a directory; choose another place")
    try:
        # A new folder first: some places take files and no folders. What permission bits say, network file systems may
        # refuse.
        with (
            tempfile.TemporaryDirectory(dir=existing, prefix=".moedisco-") as folder,
            tempfile.TemporaryFile(dir=folder) as file,
        ):
            file.write(b"\0")
            file.flush()
    except OSError as error:
        remedy = f"cannot be written: {existing} refuses it ({error.strerror}); choose another place"
        raise RunDirError(field, str(directory), remedy) from error


def check_new(output: Path) -> None:
    """Check that a directory can be written and holds nothing yet.

    Raises:
        RunDirError: It is not empty, or cannot be written or replaced.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunDirError("--output", str(output), "is not an empty directory; choose another directory")
    if output.is_symlink() or output.is_mount() or output.name in ("", ".."):
        raise RunDirError(
            "--output", str(output), "is a link or in use, and cannot be replaced; choose another directory"
        )
    check_output(output)


def unwritable_places(config: RunConfig) -> Iterator[UserError]:
    """An error for each directory that the run cannot write to; URIs and data owners' storages are not checked."""
    for field, directory in _places(config):
        try:
            check_output(directory, field)
        except RunDirError as error:
            yield error


def small_disks(config: RunConfig, plan: Plan) -> Iterator[UserError]:
    """An error for each disk with less room than the run is planned to need there."""
    for field, directory, needed, free in _rooms(config, plan):
        if free < needed:
            room = f"the run needs {_gigabytes(needed)} GB more on this disk, which has {_gigabytes(free)} GB free"
            yield DiskFullError(field, str(directory), f"{room}; free some space, or choose another place")


def tight_disks(config: RunConfig, plan: Plan) -> Iterator[str]:
    """A sentence about each disk that has room for the planned bytes, and hardly more."""
    for field, directory, needed, free in _rooms(config, plan):
        if needed <= free < _TIGHT * needed:
            yield (
                f"{field}: the disk of {directory} has {_gigabytes(free)} GB free, and the run needs "
                f"{_gigabytes(needed)} GB of them; free some space"
            )


def _places(config: RunConfig) -> list[tuple[str, Path]]:
    """Setting and path of each directory that the run writes to on this machine, or on a file system that it shares."""
    storage = config.checkpoint.storage
    checkpoints = [] if storage is None or is_uri(str(storage)) else [("checkpoint.storage", Path(storage))]
    return [("output", config.directory), *checkpoints]


def _rooms(config: RunConfig, plan: Plan) -> Iterator[tuple[str, Path, int, int]]:
    """Setting and path of the first directory on each disk, the bytes that the run needs there, and the free bytes.

    What an earlier attempt has stored in the run directory needs no room again. A run at a URI needs room for a working
    copy, whose size depends on which stages run here: it is not counted.
    """
    checkpoints = max((stage.checkpoints for stage in plan.storage), default=0)
    kept = 0 if is_uri(config.location) else _most_kept(plan, apart=config.checkpoint.storage is not None)
    sizes = {"output": max(0, kept - _size(config.directory)) if kept else 0, "checkpoint.storage": checkpoints}
    disks = defaultdict(list)
    for field, directory in _places(config):
        if (existing := _existing(directory)).is_dir():
            disks[existing.stat().st_dev].append((field, directory))
    for group in disks.values():
        field, directory = group[0]
        yield field, directory, sum(sizes[name] for name, _ in group), shutil.disk_usage(_existing(directory)).free


def _most_kept(plan: Plan, *, apart: bool) -> int:
    """Maximum bytes in the run directory: a stage's checkpoints are deleted before later stages store anything.

    Args:
        plan: The run's plan.
        apart: Whether checkpoints are stored elsewhere.
    """
    stored = itertools.accumulate(stage.stored for stage in plan.storage)
    return max(
        (total + (0 if apart else stage.checkpoints) for total, stage in zip(stored, plan.storage, strict=True)),
        default=0,
    )


def _existing(directory: Path) -> Path:
    """The directory, or the first of its parents that exists."""
    return next(
        path for path in (directory.absolute(), *directory.absolute().parents) if path.exists() or path.is_symlink()
    )


def _size(directory: Path) -> int:
    """Bytes of the files below a directory; 0 if it does not exist."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118 - a run has many files
    return total


def _gigabytes(size: float) -> str:
    return f"{size / _GB:,.2f}"
