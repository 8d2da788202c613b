"""The manifest of a checkpoint: size and checksums of every file, signed.

The key is never in the checkpoint storage.

Each block of a file has a checksum of its own, so that a worker can verify and read a part of a file without the rest.

An attacker with write access to the storage can change a file and its checksum, but cannot sign the change. The
signature covers the step, so an older checkpoint cannot replace a newer one. Each training has its own key, so
checkpoints of other trainings are refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, StringConstraints

from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.secret_file import kept_secret

BLOCK_BYTES = 16 * 2**20
"""Size of the blocks of a file that have checksums (bytes): small in memory, and large for requests to an object
store."""
KEY_BYTES = 32
"""Length of a signing key: that of a SHA-256 digest, the least that RFC 2104 recommends for HMAC."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""A file name without a folder, so that no path leads out of the checkpoint."""
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """A record that is read from storage; unknown keys, missing keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Checksum(Strict):
    """Size of a file, and SHA-256 of each of its blocks."""

    size: NonNegativeInt
    """Size of the file in bytes."""
    block_bytes: PositiveInt
    """Size of each block but the last one, which may be smaller (bytes)."""
    blocks: tuple[_Digest, ...]
    """SHA-256 of the blocks, in order; an empty file has none."""

    def block(self, index: int) -> range:
        """Positions of a block's bytes in the file."""
        return range(index * self.block_bytes, min(self.size, (index + 1) * self.block_bytes))

    def matches(self, index: int, data: bytes) -> bool:
        """Whether these are the bytes of a block."""
        return len(data) == len(self.block(index)) and hashlib.sha256(data).hexdigest() == self.blocks[index]


class Manifest(Strict):
    """The files of a complete checkpoint."""

    step: NonNegativeInt
    files: Annotated[dict[FileName, Checksum], Field(min_length=1)]
    signature: _Digest
    """HMAC-SHA256 of step and files."""

    @classmethod
    def signed(cls, step: int, files: Mapping[str, Checksum], key: bytes) -> Self:
        return cls(step=step, files=dict(sorted(files.items())), signature=_signature(step, files, key))

    def is_signed(self, step: int, key: bytes) -> bool:
        return self.step == step and hmac.compare_digest(self.signature, _signature(step, self.files, key))


def is_of_another_version(data: bytes) -> bool:
    """Whether bytes that `Manifest` rejects are a manifest of an earlier version, which has one checksum per file.

    Other rejected bytes are a damaged manifest: one bit of it may turn any key into one that no version wrote.
    """
    try:
        found = json.loads(data)
    except ValueError:
        return False
    files = found.get("files") if isinstance(found, dict) else None
    return isinstance(files, dict) and any(isinstance(file, dict) and "sha256" in file for file in files.values())


class HashingStream:
    """Counts and hashes the bytes written to a stream."""

    def __init__(self, stream: Any, block_bytes: int = BLOCK_BYTES) -> None:
        self._stream = stream
        self._block_bytes = block_bytes
        self._size = 0
        self._digests: list[str] = []
        self._hash = hashlib.sha256()  # of the block that is not full yet

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        left = view
        while left:
            room = self._block_bytes - self._size % self._block_bytes
            part, left = left[:room], left[room:]
            self._hash.update(part)
            self._size += len(part)
            if self._size % self._block_bytes == 0:
                self._digests.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Do nothing: torch calls it after every tensor, and each flush would start a new part of an upload."""

    def close(self) -> None:
        """Do nothing: the code that opened the stream closes it."""

    @property
    def checksum(self) -> Checksum:
        """The checksum of everything written so far."""
        last = (self._hash.hexdigest(),) if self._size % self._block_bytes else ()
        return Checksum(size=self._size, block_bytes=self._block_bytes, blocks=(*self._digests, *last))


def signing_key(path: Path) -> bytes:
    """Read the signing key from its file in the run directory; create it if the file does not exist.

    Raises:
        RunDirError: The file cannot be read or written, or holds no key.
    """
    try:
        key = kept_secret(path, lambda: secrets.token_bytes(KEY_BYTES))
    except OSError as error:
        remedy = (
            f"is the key of this training's checkpoints and cannot be read or written ({error.strerror}); "
            "make it accessible"
        )
        raise RunDirError("output", str(path), remedy) from error
    if len(key) != KEY_BYTES:
        raise RunDirError(
            "output", str(path), f"is no key of {KEY_BYTES} bytes; delete it together with its checkpoints"
        )
    return key


def _signature(step: int, files: Mapping[str, Checksum], key: bytes) -> str:
    signed = {
        "step": step,
        "files": {name: [file.size, file.block_bytes, *file.blocks] for name, file in files.items()},
    }
    return hmac.new(key, json.dumps(signed, sort_keys=True).encode(), hashlib.sha256).hexdigest()
