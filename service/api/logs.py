"""Reads the logs of a run's driver and workers: their last lines, and new lines as they are written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.concurrency import run_in_threadpool

from service.api.files import OpenFile, open_file
from service.errors import NotFound
from service.run_storage import RunStorage, StoredFile
from service.schemas import LogFile

DRIVER = "driver"
_DRIVERS, _WORKERS = "ray.log", "logs"
_BLOCK = 2**16
_MOST = 8 * 2**20
"""Number of bytes at the end of a log in which its last lines are searched; earlier lines are not found."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,127}")


def list_logs(storage: RunStorage) -> list[LogFile]:
    """Logs of a run, the driver's log first."""
    found = [
        LogFile(name=name, bytes=file.bytes, updated=file.updated)
        for file in storage.files(_WORKERS)
        if file.path.endswith(".log")
        and _NAME.fullmatch(name := file.path.removeprefix(f"{_WORKERS}/").removesuffix(".log"))
    ]
    with contextlib.suppress(FileNotFoundError), contextlib.closing(storage.open(_DRIVERS)) as driver:
        return [LogFile(name=DRIVER, bytes=driver.size, updated=driver.modified), *found]
    return found


def open_log(storage: RunStorage, name: str) -> OpenFile:
    """Open a log.

    Raises:
        NotFound: The log does not exist.
    """
    if not _NAME.fullmatch(name):
        raise NotFound("the run has no such log")
    return open_file(storage, _DRIVERS if name == DRIVER else f"{_WORKERS}/{name}.log")


def tail_start(file: StoredFile, size: int, lines: int) -> int:
    """Position at which the last lines of a log begin.

    Args:
        file: Open log.
        size: Size of the log to consider (bytes).
        lines: Number of lines; text after the last newline counts as a line.
    """
    if not lines:
        return size
    wanted, place = lines, size
    if size and file.read_at(size - 1, 1) == b"\n":
        wanted += 1
    lowest = max(0, size - _MOST)
    while place > lowest:
        start = max(lowest, place - _BLOCK)
        block = file.read_at(start, place - start)
        found = block.count(b"\n")
        if found >= wanted:
            for _ in range(wanted):
                block = block[: block.rindex(b"\n")]
            return start + len(block) + 1
        wanted -= found
        place = start
    return lowest


async def follow(
    file: StoredFile, start: int, ended: Callable[[], bool], pause: Callable[[float], Awaitable[bool]]
) -> AsyncIterator[bytes]:
    """Yield the content of a log from `start` on, and new content as it is written, until the log is complete.

    Args:
        file: Open log, which is closed at the end.
        start: Position of the first byte.
        ended: Returns whether the log is complete; called in a thread before each read.
        pause: Waits for a number of seconds; returns false to stop following.
    """
    with contextlib.closing(file):
        while True:
            last = await run_in_threadpool(ended)
            while block := await run_in_threadpool(file.read_at, start, _BLOCK):
                start += len(block)
                yield block
            if last or not await pause(file.poll_seconds):
                return
