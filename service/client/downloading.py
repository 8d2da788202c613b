"""Dialogues that bring files: a run's model as one archive, and single files that go on where they were cut off."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import httpx

from moedisco_ray.core.errors import RunDirError, UserError
from service.client import run_calls
from service.client.asking import after_refusal, ask, away, next_pause
from service.client.calls import Answer, Dialogue, Send, Sink
from service.client.errors import DownloadError
from service.client.patience import Attempts, Patience
from service.client.unpacking import Unpacker, below, unwritable
from service.schemas import Artifact

Progress = Callable[[int, int], None]
"""Told the bytes that are there and the bytes there will be."""

MODEL = "model"
"""Where a run directory holds its model."""


def no_progress(there: int, total: int) -> None:
    """Tell nobody."""


def download(run_id: str, directory: Path, progress: Progress, patience: Patience, url: str) -> Dialogue[Path]:
    """Bring a run's model into a new directory, which appears when it is whole.

    It comes as one archive, which is resumed where the connection was cut. What has come is kept next to the directory meanwhile:
    the same download brings what is missing later, file by file.

    Args:
        run_id: The run.
        directory: Must be absent or empty.
        progress: Told now and then how far it is.
        patience: How long the service may be away.
        url: The service's, for messages.

    Raises:
        RunDirError: The directory holds something.
        UserError: The run has no model yet.
        DownloadError: What came cannot be kept.
    """
    directory = directory.absolute()
    _check_absent(directory)
    listed = yield from ask(run_calls.artifacts(run_id), patience, url)
    files = [artifact for artifact in listed if artifact.path.startswith(f"{MODEL}/")]
    if not files:
        raise UserError("RUN", run_id, "has no model yet; it is there when the run has succeeded")
    total = sum(file.bytes for file in files)
    draft = directory.with_name(f".{directory.name}.{run_id}.part")
    begun = draft.exists()
    with _told_of_the_disk(draft):
        draft.mkdir(parents=True, exist_ok=True)
    try:
        if not begun:
            yield from _unpack(run_id, draft, lambda there: progress(there, total), patience, url)
        done = 0
        for file in files:
            yield from _complete(run_id, file, draft, _shifted(progress, done, total), patience, url)
            done += file.bytes
    except DownloadError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    with _told_of_the_disk(directory):
        draft.replace(directory)
    return directory


def fetch(run_id: str, path: str, target: Path, progress: Progress, patience: Patience, url: str) -> Dialogue[Path]:
    """Bring one file of the run directory; `target` is replaced when all of it has come.

    Args:
        run_id: The run.
        path: In the run directory.
        target: The file to write.
        progress: Told now and then how far it is.
        patience: How long the service may be away.
        url: The service's, for messages.

    Raises:
        DownloadError: The disk does not take it.
    """
    draft = target.with_name(f".{target.name}.part")
    with _told_of_the_disk(target):
        try:
            with draft.open("wb") as file:
                yield from _receive(run_id, path, file, progress, patience, url)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    return target


def _unpack(run_id: str, draft: Path, received: Callable[[int], None], patience: Patience, url: str) -> Dialogue[None]:
    attempts, pause = Attempts(patience), 0.0
    unpacker = Unpacker(draft, received)
    taken, version = 0, None

    def body(head: Answer) -> Sink:
        nonlocal unpacker, taken, version
        if taken and head.status != 206:    # from its beginning: it is another one by now
            unpacker.close()
            with _told_of_the_disk(draft):
                shutil.rmtree(draft)
                draft.mkdir()
            unpacker, taken = Unpacker(draft, received), 0
        version = head.headers.get("etag")

        def take(chunk: bytes) -> None:
            nonlocal taken
            unpacker.take(chunk)
            taken += len(chunk)
            attempts.went_well()

        return take

    try:
        while True:
            try:
                answer = yield Send(run_calls.model_archive(run_id, taken, version), pause, body)
            except httpx.TransportError as error:
                pause = next_pause(attempts, away(url, error))
                continue
            if answer.status in {200, 206} or unpacker.complete:
                return
            pause = after_refusal(attempts, answer)
    finally:
        unpacker.close()


def _complete(run_id: str, wanted: Artifact, draft: Path, progress: Progress, patience: Patience, url: str) -> Dialogue[None]:
    path = below(draft, wanted.path)
    with _told_of_the_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() > wanted.bytes:
                file.truncate(0)
            if file.tell() < wanted.bytes:
                yield from _receive(run_id, wanted.path, file, progress, patience, url)
            size = file.tell()
    if size != wanted.bytes:
        raise DownloadError(f"{wanted.path} has {size} bytes where the service said {wanted.bytes}")


def _receive(run_id: str, path: str, file: BinaryIO, progress: Progress, patience: Patience, url: str) -> Dialogue[None]:
    attempts, pause = Attempts(patience), 0.0
    version: str | None = None

    def received(head: Answer) -> Sink:
        nonlocal version
        version = head.headers.get("etag")
        if head.status != 206:  # the whole file: it is another one by now, or this is the first time
            file.seek(0)
            file.truncate()
        total = file.tell() + int(head.headers.get("content-length", "0"))

        def take(chunk: bytes) -> None:
            with _told_of_the_disk(Path(file.name)):
                file.write(chunk)
            attempts.went_well()
            progress(file.tell(), total)

        return take

    while True:
        try:
            answer = yield Send(run_calls.artifact(run_id, path, file.tell(), version), pause, received)
        except httpx.TransportError as error:
            pause = next_pause(attempts, away(url, error))
            continue
        if answer.status in {200, 206}:
            return
        if answer.status == 416 and answer.headers.get("content-range") == f"bytes */{file.tell()}":
            return  # the connection was cut behind the last byte
        pause = after_refusal(attempts, answer)


def _check_absent(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise RunDirError("DIR", str(directory), "is there already; choose another, or remove it")


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda there, _: progress(done + there, total)


@contextlib.contextmanager
def _told_of_the_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(str(path), error) from error
