"""Uploads of data sets: file by file, in parts, from where the connection was lost."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path

from moedisco_ray.core.errors import UserError
from service import schemas
from service.client.downloading import Progress
from service.client.errors import ServiceAway, ServiceProblem
from service.client.http import PASSING, Connection, Request, json_body
from service.domain.datasets import MOST_FILES

_PART = 8 * 2**20
"""Size of the parts in which a file is sent (bytes); the service waits 30 s for each."""
_SECONDS = 60.0
"""Maximum wait for the answer to a part (s)."""
_WORKED_PER_SECOND = 50e6
"""Speed at which a slow disk is read to check the hash of a file, or copied to a bucket (bytes per second)."""
_MOST_PASSES = 3
"""Number of times that all missing files are sent: other requests may delete them meanwhile."""
_PASSING = PASSING | {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT}


async def upload(
    connection: Connection, files: Mapping[str, Path], name: str, project: str | None, progress: Progress
) -> schemas.DatasetInfo:
    """Create a data set from local files; what the service has already is not sent again.

    A lost connection is opened again, and the retry policy starts anew whenever something has arrived.

    Args:
        connection: Connection to the service.
        files: Local file by its path in the data set.
        name: Name of the data set.
        project: Id or name of the project whose members may see it; None means the caller's own.
        progress: Called with the bytes that have arrived and the total.

    Raises:
        UserError: A file cannot be read, or there are too many.
        ServiceProblem: The service refuses the data set, or a file has changed during the upload.
        ServiceAway: The service cannot be reached.
    """
    if len(files) > MOST_FILES:
        raise UserError("PATH", name, f"has {len(files)} files, more than {MOST_FILES}; put the text into fewer files")
    listed = [await asyncio.to_thread(described, path, file) for path, file in files.items()]
    sending = _Upload(connection, dict(zip((info.sha256 for info in listed), files.values(), strict=True)), progress)
    body = json_body(name=name, project=project, files=[info.model_dump() for info in listed])
    sending.total = sum({info.sha256: info.bytes for info in listed}.values())
    made = None
    while made is None:
        made = await connection.repeated(lambda: sending.round(body), _PASSING)
    progress(sending.total, sending.total)
    return made


def files_at(path: Path) -> dict[str, Path]:
    """A file, or the files below a folder that are not hidden, by their path in a data set.

    Raises:
        UserError: The path does not exist.
    """
    if path.is_file():
        return {path.name: path}
    if not path.is_dir():
        raise UserError("PATH", str(path), "no such file or folder")
    return dict(_below(path, "", frozenset()))


def name_of(path: Path) -> str:
    """A name for the data set of a file or folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip("._-")[:64] or "text"


def _below(folder: Path, prefix: str, above: frozenset[Path]) -> Iterator[tuple[str, Path]]:
    real = folder.resolve()
    if real in above:  # a link to a folder above it would be followed for ever
        return
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry, f"{prefix}{entry.name}/", above | {real})
        elif entry.is_file():
            yield f"{prefix}{entry.name}", entry


def described(path: str, file: Path) -> schemas.DatasetFileInfo:
    """Size and hash of a local file, as the file of a data set.

    Raises:
        UserError: The file cannot be read, or the service takes no file of this name.
    """
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            return schemas.DatasetFileInfo(path=path, bytes=opened.tell(), sha256=digest)
    except OSError as error:
        raise UserError("PATH", str(file), f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError("PATH", str(file), "cannot be uploaded under this name; rename it") from error


class _Upload:
    """The state of an upload between two requests.

    Args:
        files: Local file by its hash.
    """

    total = 0
    """Size of all files (bytes)."""

    def __init__(self, connection: Connection, files: Mapping[str, Path], progress: Progress) -> None:
        self._connection = connection
        self._files = files
        self._progress = progress
        self._arrived = -1
        self._passes = 0

    async def round(self, body: bytes) -> schemas.DatasetInfo | None:
        """Ask what is missing, and send it; None if the rest was lost after something has arrived.

        Raises:
            ServiceAway, ServiceProblem: Nothing has arrived since the last round.
            UserError: All files were sent, and are missing again.
        """
        silence = _SECONDS + self.total / _WORKED_PER_SECOND
        request = Request("POST", "/v1/datasets", body=body, silence=silence, changes_nothing=True)
        found = await self._connection.ask(schemas.DatasetUpload, request)
        if found.dataset is not None:
            return found.dataset
        if self._passes == _MOST_PASSES:
            raise UserError(
                "PATH", None, "the service does not keep what it receives; do its replicas share --home-dir?"
            )
        before, self._arrived = self._arrived, self.total - sum(blob.bytes - blob.offset for blob in found.missing)
        try:
            for blob in found.missing:
                await self._send(blob)
        except (ServiceAway, ServiceProblem) as error:
            if self._arrived <= before or (isinstance(error, ServiceProblem) and error.status not in _PASSING):
                raise
        else:
            self._passes += 1
        return None

    async def _send(self, blob: schemas.BlobState) -> None:
        offset = blob.offset
        while True:
            part = await asyncio.to_thread(_read, self._files[blob.sha256], offset)
            last = offset + len(part) >= blob.bytes
            span = f"{offset}-{offset + len(part) - 1}" if part else "*"
            await self._connection.read(
                Request(
                    "PUT",
                    f"/v1/blobs/{blob.sha256}",
                    headers={"Content-Type": "application/octet-stream", "Content-Range": f"bytes {span}/{blob.bytes}"},
                    body=part,
                    silence=_SECONDS + (blob.bytes / _WORKED_PER_SECOND if last else 0.0),
                )
            )
            offset += len(part)
            self._arrived += len(part)
            self._progress(self._arrived, self.total)
            if last:
                return


def _read(file: Path, offset: int) -> bytes:
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            return opened.read(_PART)
    except OSError as error:
        raise UserError("PATH", str(file), f"cannot be read ({error.strerror})") from error
