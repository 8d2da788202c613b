"""Speed of writing to a storage and reading from it."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from pathlib import Path

from moedisco_ray.core.errors import masked
from moedisco_ray.core.records.measurements import StorageRecord
from moedisco_ray.core.store.locations import Location, is_uri
from moedisco_ray.core.store.remote import Remote

_PART_BYTES = 16 * 2**20


def storage_speed(location: Location, size: int, setting: str, node: str) -> StorageRecord:
    """Write a file to a storage, read it again, and delete it.

    Args:
        location: Directory or URI. Of a directory that does not exist yet, the nearest folder that does is measured.
        size: Size of the file (bytes).
        setting: Setting that names the storage.
        node: Name of this machine.

    Raises:
        OSError: The directory cannot be written.
        MoeDiscoError: The URI cannot be reached, or does not respond.
    """
    seconds = _at_uri(str(location), size, setting) if is_uri(location) else _in_folder(Path(location), size)
    return StorageRecord(node=node, location=masked(str(location)), write=size / seconds[0], read=size / seconds[1])


def _in_folder(folder: Path, size: int) -> tuple[float, float]:
    """Seconds of a write that reached the disk, and of a read that does not come from memory."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    part = os.urandom(min(size, _PART_BYTES))
    with tempfile.NamedTemporaryFile(dir=existing, prefix=".moedisco-doctor-") as file:
        began = time.perf_counter()
        for _ in range(-(-size // len(part))):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        read_from = time.perf_counter()
        while file.read(_PART_BYTES):
            pass
        return written - began, time.perf_counter() - read_from


def _at_uri(uri: str, size: int, setting: str) -> tuple[float, float]:
    remote, name = Remote(uri, setting), f"moedisco-doctor-{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        sent = Path(folder, "sent")
        sent.write_bytes(os.urandom(size))
        began = time.perf_counter()
        try:
            remote.upload(sent, name)
            written = time.perf_counter()
            remote.download(name, Path(folder, "received"))
            return written - began, time.perf_counter() - written
        finally:
            remote.delete(name)
