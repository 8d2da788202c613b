"""Reads the logs of a run's driver and workers: their last lines, and new lines as they are written."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool

from service import run_files
from service.api.files import OpenFile, open_file
from service.errors import NotFound
from service.schemas import LogFile

DRIVER = "driver"
_DRIVERS = "ray.log"
POLL_SECONDS = 0.5
"""Poll interval while a log is followed (s)."""
_BLOCK = 2**16
_MOST = 8 * 2**20
"""Size of the end of a log that is searched for its last lines (bytes); lines before it are not found."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}")


def list_logs(directory: Path) -> list[LogFile]:
    """Logs of a run, the driver's log first."""
    return [*_logs_in(directory, "", [(DRIVER, _DRIVERS)]), *_logs_in(directory, "logs", None)]


def _logs_in(directory: Path, folder: str, wanted: Sequence[tuple[str, str]] | None) -> Iterator[LogFile]:
    """Logs in a folder: those in `wanted`, (name, file name) pairs, or all if it is None."""
    try:
        number = run_files.open_folder(directory, folder)
    except FileNotFoundError:
        return
    try:
        if wanted is None:
            with os.scandir(number) as entries:
                wanted = sorted((entry.name.removesuffix(".log"), entry.name) for entry in entries if entry.name.endswith(".log"))
        for name, file in wanted:
            with contextlib.suppress(FileNotFoundError):
                state = os.stat(file, dir_fd=number, follow_symlinks=False)
                if stat.S_ISREG(state.st_mode) and _NAME.fullmatch(name):
                    yield LogFile(name=name, bytes=state.st_size, updated=state.st_mtime)
    finally:
        os.close(number)


def open_log(directory: Path, name: str) -> OpenFile:
    """Open a log.

    Raises:
        NotFound: The log does not exist.
    """
    if not _NAME.fullmatch(name):
        raise NotFound("the run has no such log")
    return open_file(directory, _DRIVERS if name == DRIVER else f"logs/{name}.log")


def tail_start(file: BinaryIO, size: int, lines: int) -> int:
    """Position at which the last lines of a log begin.

    Args:
        file: Open log.
        size: Size of the log to consider (bytes).
        lines: Number of lines; text after the last newline counts as a line.
    """
    if not lines:
        return size
    number, wanted, place = file.fileno(), lines, size
    if size and os.pread(number, 1, size - 1) == b"\n":
        wanted += 1
    lowest = max(0, size - _MOST)
    while place > lowest:
        start = max(lowest, place - _BLOCK)
        block = os.pread(number, place - start, start)
        found = block.count(b"\n")
        if found >= wanted:
            for _ in range(wanted):
                block = block[:block.rindex(b"\n")]
            return start + len(block) + 1
        wanted -= found
        place = start
    return lowest


async def follow(
    file: BinaryIO, start: int, ended: Callable[[], bool], pause: Callable[[float], Awaitable[bool]],
) -> AsyncIterator[bytes]:
    """Yield the content of a log from `start` on, and new content as it is written, until the log is complete.

    Args:
        file: Open log, which is closed at the end.
        start: Position of the first byte.
        ended: Whether the log is complete; called in a thread before each read.
        pause: Waits for a number of seconds; returns false to stop following.
    """
    with file:
        while True:
            last = await run_in_threadpool(ended)
            while block := await run_in_threadpool(os.pread, file.fileno(), _BLOCK, start):
                start += len(block)
                yield block
            if last or not await pause(POLL_SECONDS):
                return
