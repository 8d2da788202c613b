"""The manifest of a checkpoint: size and SHA-256 of every file, signed with a key that the checkpoint's storage never holds.

Whoever can write to the storage can change a file and its checksum, but cannot sign the change. The signature covers the step: an
older checkpoint does not pass for a newer one. Each training has a key of its own: a checkpoint of another training is refused.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints

from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.secret_file import kept_secret

KEY_BYTES = 32

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""A plain name: no folder, no way out of one."""
_Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    """A record read from storage: unknown keys, missing keys and other types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Checksum(Strict):
    """What a file must hold."""

    size: NonNegativeInt
    """Bytes."""
    sha256: _Digest

    @classmethod
    def of(cls, data: bytes) -> Self:
        """The checksum of these bytes."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


class Manifest(Strict):
    """The files of a complete checkpoint."""

    step: NonNegativeInt
    files: Annotated[dict[FileName, Checksum], Field(min_length=1)]
    signature: _Digest
    """HMAC-SHA256 of everything above."""

    @classmethod
    def signed(cls, step: int, files: Mapping[str, Checksum], key: bytes) -> Self:
        """The manifest of a checkpoint, with its signature."""
        return cls(step=step, files=dict(sorted(files.items())), signature=_signature(step, files, key))

    def is_signed(self, step: int, key: bytes) -> bool:
        """Whether it was signed with this key as the manifest of this step."""
        return self.step == step and hmac.compare_digest(self.signature, _signature(step, self.files, key))


def is_of_another_version(data: bytes) -> bool:
    """Whether bytes that are no `Manifest` list a checkpoint's files all the same, as the manifests before signatures did."""
    try:
        found = json.loads(data)
    except ValueError:
        return False
    return isinstance(found, dict) and "files" in found and "signature" not in found


class HashingStream:
    """Counts and hashes what is written through it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._size = 0
        self._hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write bytes to the stream."""
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self._hash.update(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Do nothing: torch asks for it after every tensor, which would cut an upload into that many parts."""

    def close(self) -> None:
        """Do nothing: the code that opened the stream closes it."""

    @property
    def checksum(self) -> Checksum:
        """The checksum of everything written so far."""
        return Checksum(size=self._size, sha256=self._hash.hexdigest())


def signing_key(path: Path) -> bytes:
    """The key in a file of the run directory, made there where it does not exist.

    Raises:
        RunDirError: It cannot be read or written, or is no key.
    """
    try:
        key = kept_secret(path, lambda: secrets.token_bytes(KEY_BYTES))
    except OSError as error:
        remedy = f"signs the checkpoints of this training and cannot be read or written ({error.strerror})"
        raise RunDirError("output", str(path), remedy) from error
    if len(key) != KEY_BYTES:
        raise RunDirError("output", str(path), f"is no key of {KEY_BYTES} bytes; delete it together with its checkpoints")
    return key


def _signature(step: int, files: Mapping[str, Checksum], key: bytes) -> str:
    signed = {"step": step, "files": {name: [file.size, file.sha256] for name, file in files.items()}}
    return hmac.new(key, json.dumps(signed, sort_keys=True).encode(), hashlib.sha256).hexdigest()
