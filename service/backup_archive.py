"""The file of a backup: a compressed tar archive of tables and files, with a manifest as its last member.

`tables/NAME/NUMBER.jsonl` has rows of a table, one on each line, and `state/NAME` is a file of the state directory. A
file is read whole and compared with its manifest before anything is taken from it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moedisco_ray.core.errors import ConfigError
from service.database.snapshots import Row, TableShape

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
_PART_BYTES = 4 * 2**20
"""Size from which on a member with rows is closed and the next one begins (bytes)."""
_MOST_BYTES = 256 * 2**20
"""Maximum size of a member (bytes); no row is nearly as long."""
_UNREADABLE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile)


class Member(BaseModel):
    """A file in the archive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    sha256: str


class StoredTable(TableShape):
    """A table in the archive, with its number of rows."""

    rows: int


class Manifest(BaseModel):
    """Contents of a backup."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    version: str
    """Version of the software that made the backup."""
    revision: str
    """Revision of the tables."""
    database: str
    """Kind of the database, `sqlite` or `postgresql`."""
    created: float
    tables: tuple[StoredTable, ...]
    members: tuple[Member, ...]

    def count(self, table: str) -> int:
        """Number of rows of a table; 0 for one that the backup does not have."""
        return sum(each.rows for each in self.tables if each.name == table)


class ArchiveWriter:
    """Writes an archive to an open file, in a `with` block; `finish` writes the manifest."""

    def __init__(self, file: IO[bytes]) -> None:
        self._packed = gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, mtime=0)
        self._tar = tarfile.open(fileobj=self._packed, mode="w")  # noqa: SIM115 - `finish` closes it
        self._members: list[Member] = []
        self._tables: list[StoredTable] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # the disk is full, and the caller gets that error
            self._packed.close()

    def add_table(self, shape: TableShape, rows: Iterator[Row]) -> None:
        """Add all rows of a table."""
        part, count = bytearray(), 0
        for row in rows:
            part += json.dumps(row, separators=(",", ":")).encode() + b"\n"
            count += 1
            if len(part) >= _PART_BYTES:
                self._add_part(shape, part)
                part.clear()
        if part:
            self._add_part(shape, part)
        self._tables.append(StoredTable(name=shape.name, columns=shape.columns, rows=count))

    def add_file(self, name: str, content: bytes) -> None:
        """Add a file of the state directory."""
        self._add(f"state/{name}", content)

    def finish(self, *, revision: str, database: str, created: float) -> Manifest:
        """Write the manifest, and close the archive but not its file."""
        manifest = Manifest(
            version=version("moedisco-ray"),
            revision=revision,
            database=database,
            created=created,
            tables=tuple(self._tables),
            members=tuple(self._members),
        )
        self._add(MANIFEST, manifest.model_dump_json(indent=2).encode())
        self._tar.close()
        self._packed.close()
        return manifest

    def _add_part(self, shape: TableShape, content: bytes | bytearray) -> None:
        prefix = _folder(shape)
        number = sum(member.name.startswith(prefix) for member in self._members)
        self._add(f"{prefix}{number:06}.jsonl", bytes(content))

    def _add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o600
        self._tar.addfile(info, io.BytesIO(content))
        self._members.append(_described(name, content))


def read_manifest(path: Path) -> Manifest:
    """Read a whole archive, and compare it with its manifest.

    Raises:
        ConfigError: The file cannot be read, is damaged, or has a form that a later version introduced.
    """
    found: list[Member] = []
    counted: Counter[tuple[str, int]] = Counter()
    content = b""
    for name, content in _contents(path):
        found.append(_described(name, content))
        if name.startswith("tables/"):
            counted.update((name.split("/")[1], len(row)) for row in _rows(path, content))
    if not found or found.pop().name != MANIFEST:
        raise _damaged(path, "its end is missing")
    manifest = _parsed(path, content)
    if manifest.members != tuple(found):
        raise _damaged(path, "its files are not those of its manifest")
    if counted != Counter({(each.name, len(each.columns)): each.rows for each in manifest.tables if each.rows}):
        raise _damaged(path, "its rows are not those of its manifest")
    return manifest


def stored_rows(path: Path, manifest: Manifest) -> Iterator[tuple[TableShape, list[Row]]]:
    """Rows of an archive, part by part, in the order in which they can be inserted.

    Raises:
        ConfigError: The file is not the one of the manifest any more.
    """
    shapes = {_folder(each): each for each in manifest.tables}
    for name, content in _verified(path, manifest):
        shape = shapes.get(f"{name.rpartition('/')[0]}/")
        if shape is not None:
            yield shape, list(_rows(path, content))


def stored_files(path: Path, manifest: Manifest) -> dict[str, bytes]:
    """Files of the state directory in an archive, by name; raises the same error as `stored_rows`."""
    return {
        name.removeprefix("state/"): content for name, content in _verified(path, manifest) if name.startswith("state/")
    }


def _folder(shape: TableShape) -> str:
    return f"tables/{shape.name}/"


def _described(name: str, content: bytes) -> Member:
    return Member(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _verified(path: Path, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    known = {member.name: member for member in manifest.members}
    for name, content in _contents(path):
        if name != MANIFEST:
            if known.get(name) != _described(name, content):
                raise _damaged(path, "it has changed while it was read")
            yield name, content


def _contents(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with gzip.open(path) as packed:
            with tarfile.open(fileobj=packed, mode="r|") as tar:
                for info in tar:
                    file = tar.extractfile(info) if info.isreg() and info.size <= _MOST_BYTES else None
                    if file is None:
                        raise _damaged(path, "it has members that no backup has")
                    yield info.name, file.read()
            while packed.read(_PART_BYTES):  # to its end, which has the checksum of all
                pass
    except _UNREADABLE as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise ConfigError("FILE", str(path), f"cannot be read ({error.strerror or error})") from error


def _rows(path: Path, content: bytes) -> Iterator[Row]:
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _damaged(path, "a row is no JSON") from error
        if not isinstance(row, list):
            raise _damaged(path, "a row is no list")
        yield row


def _parsed(path: Path, content: bytes) -> Manifest:
    try:
        document: Any = json.loads(content)
        form = document.get("format") if isinstance(document, dict) else None
        if isinstance(form, int) and form > FORMAT:
            made_by = str(document.get("version"))
            raise ConfigError("FILE", str(path), f"was made by a later version ({made_by}); restore it with that one")
        return Manifest.model_validate(document)
    except (ValidationError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _damaged(path, "its manifest cannot be read") from error


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError("FILE", str(path), f"is no backup of the service, or is damaged: {why}; use another backup")
