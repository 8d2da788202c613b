"""Downloads: a run's model as one archive, single files, and data sets. All resume where the connection was lost."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import httpx

from moedisco_ray.core.errors import DamagedError, RunDirError, UserError
from moedisco_ray.core.store.verification import Verifier
from service.client.errors import DownloadError, problem_in
from service.client.http import Connection, Request, segment
from service.client.unpacking import Unpacker, below, unwritable
from service.schemas import Artifact, ArtifactPage, DatasetDetail

Progress = Callable[[int, int], None]
"""Function called with the number of bytes received and the total number of bytes. `Client` calls it in the client's
own thread."""

_MODEL = "model"
_PARTIAL, _RANGE_REFUSED = 206, 416


def no_progress(done: int, total: int) -> None:
    """A progress callback that does nothing."""


async def download(connection: Connection, run_id: str, run_path: str, directory: Path, progress: Progress) -> Path:
    """Download a run's model into a new directory, which is created only when the download is complete.

    The model comes as one archive. Unfinished downloads stay in a hidden directory next to `directory`; a later call
    with the same arguments downloads the missing parts, file by file.

    Args:
        connection: Connection to the service.
        run_id: Id of the run.
        run_path: URL path of the run.
        directory: Target directory; must be absent or empty.
        progress: Called with the bytes received and the total.

    Raises:
        RunDirError: The directory is not empty.
        UserError: The run has no model yet.
        DownloadError: The download is unsafe, damaged or not what the run wrote, or cannot be written.
    """
    directory = directory.absolute()
    _check_absent(directory)
    listed = await connection.ask(ArtifactPage, Request("GET", f"{run_path}/artifacts"))
    files = [artifact for artifact in listed.items if artifact.path.startswith(f"{_MODEL}/")]
    if not files:
        raise UserError("RUN", run_id, "has no model yet; wait until the run has succeeded")
    total = sum(file.bytes for file in files)
    draft = directory.with_name(f".{directory.name}.{run_id}.part")
    is_new = not draft.exists()
    with _disk_errors(draft):
        draft.mkdir(parents=True, exist_ok=True)
    try:
        if is_new:
            await _unpack(connection, f"{run_path}/model.tar", draft, lambda done: progress(done, total))
        done = 0
        for file in files:
            await _complete(
                connection, f"{run_path}/artifacts/{quote(file.path)}", file, draft, _shifted(progress, done, total)
            )
            done += file.bytes
        await asyncio.to_thread(_verify, draft)
    except DownloadError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    with _disk_errors(directory):
        draft.replace(directory)
    return directory


def _verify(model: Path) -> None:
    """Compare a model with the checksums in its manifest.

    Raises:
        DownloadError: A file is damaged.
    """
    try:
        Verifier().verify(model)
    except DamagedError as error:
        raise DownloadError(
            f"{error.file.partition('/')[2]} is not what the run wrote: it is damaged there, or was on its way; "
            "download again, or run it again with --repair"
        ) from error


async def download_dataset(connection: Connection, dataset: DatasetDetail, directory: Path, progress: Progress) -> Path:
    """Download a data set into a new directory, which is created only when the download is complete.

    An unfinished download stays in a hidden directory next to `directory`, and a later call continues it.

    Args:
        connection: Connection to the service.
        dataset: The data set with its files.
        directory: Target directory; must be absent or empty.
        progress: Called with the bytes received and the total.

    Raises:
        RunDirError: The directory is not empty.
        DownloadError: A file is damaged, or cannot be written.
    """
    directory = directory.absolute()
    _check_absent(directory)
    draft = directory.with_name(f".{directory.name}.{dataset.id}.part")
    with _disk_errors(draft):
        draft.mkdir(parents=True, exist_ok=True)
    done = 0
    for file in dataset.files:
        path = f"/v1/datasets/{segment(dataset.id)}/files/{quote(file.path)}"
        wanted = Artifact(path=f"{dataset.name}/{file.path}", bytes=file.bytes, updated=dataset.created)
        await _complete(connection, path, wanted, draft, _shifted(progress, done, dataset.bytes))
        done += file.bytes
        target = below(draft, wanted.path)
        if await asyncio.to_thread(_hash_of, target) != file.sha256:
            target.unlink()
            raise DownloadError(f"{file.path} has arrived damaged; download again")
    with _disk_errors(directory):
        draft.replace(directory)
    return directory


def _hash_of(path: Path) -> str:
    with _disk_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def fetch(connection: Connection, path: str, target: Path, progress: Progress) -> Path:
    """Download one file; `target` is replaced when the file is complete.

    Args:
        connection: Connection to the service.
        path: URL path of the file.
        target: Local file to write.
        progress: Called with the bytes received and the total.

    Raises:
        DownloadError: The file cannot be written.
    """
    draft = target.with_name(f".{target.name}.part")
    with _disk_errors(target):
        try:
            with draft.open("wb") as file:
                await _receive(connection, path, file, progress)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    return target


async def _unpack(connection: Connection, path: str, draft: Path, received: Callable[[int], None]) -> None:
    unpacker = Unpacker(draft, received)
    taken, version = 0, None

    async def read(response: httpx.Response) -> AsyncGenerator[bytes]:
        nonlocal unpacker, taken, version
        if taken and response.status_code != _PARTIAL:  # the archive has changed since then: unpack it from the start
            unpacker.close()
            with _disk_errors(draft):
                shutil.rmtree(draft)
                draft.mkdir()
            unpacker, taken = Unpacker(draft, received), 0
        version = response.headers.get("etag")
        async for chunk in response.aiter_bytes():
            yield chunk

    try:
        async with contextlib.aclosing(
            connection.stream(lambda: _rest(path, taken if version else 0, version), read)
        ) as chunks:
            async for chunk in chunks:
                unpacker.take(chunk)
                taken += len(chunk)
                if unpacker.complete:
                    return
    finally:
        unpacker.close()


async def _complete(connection: Connection, path: str, wanted: Artifact, draft: Path, progress: Progress) -> None:
    target = below(draft, wanted.path)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            if file.tell() > wanted.bytes:
                file.truncate(0)
            if file.tell() < wanted.bytes:
                await _receive(connection, path, file, progress)
            size = file.tell()
    if size != wanted.bytes:
        raise DownloadError(f"{wanted.path} has {size} bytes; the service announced {wanted.bytes}")


async def _receive(connection: Connection, path: str, file: BinaryIO, progress: Progress) -> None:
    version: str | None = None
    total = 0

    async def read(response: httpx.Response) -> AsyncGenerator[bytes]:
        nonlocal version, total
        if response.status_code == _RANGE_REFUSED:
            if response.headers.get("content-range") == f"bytes */{file.tell()}":
                return  # the file was already complete when the connection was lost
            await response.aread()
            raise problem_in(response)
        version = response.headers.get("etag")
        if response.status_code != _PARTIAL:  # the whole file: this is the first request, or the file has changed
            file.seek(0)
            file.truncate()
        total = file.tell() + int(response.headers.get("content-length", "0"))
        async for chunk in response.aiter_bytes():
            yield chunk

    async with contextlib.aclosing(connection.stream(lambda: _rest(path, file.tell(), version), read)) as chunks:
        async for chunk in chunks:
            with _disk_errors(Path(file.name)):
                file.write(chunk)
            progress(file.tell(), total)


def _rest(path: str, start: int, version: str | None) -> Request:
    """Request the bytes of a file from `start` on, or the whole file if its version (ETag) has changed."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if version is not None:
            headers["If-Range"] = version
    return Request("GET", path, headers=headers, expected=frozenset({_RANGE_REFUSED}))


def _check_absent(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if directory.exists() or directory.is_symlink():
        raise RunDirError("DIR", str(directory), "exists already; choose another, or remove it")


def _shifted(progress: Progress, done: int, total: int) -> Progress:
    return lambda received, _: progress(done + received, total)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise unwritable(str(path), error) from error
