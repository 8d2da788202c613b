"""Local files for the readers, each checked at the moment of opening."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs

from moedisco_ray.core.read_roots import opened

_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}


class ConfinedFiles:
    """Opens local files as a pyarrow file system does, if they are inside the read roots; see `moedisco_ray.core.read_roots`.

    Args:
        system: The local file system.
    """

    def __init__(self, system: fs.LocalFileSystem) -> None:
        self._system = system

    def open_input_file(self, path: str) -> pa.NativeFile:
        """A file to read at any position.

        Raises:
            OSError: It cannot be opened, or is outside of the read roots.
        """
        with opened(Path(path)) as found:
            return self._system.open_input_file(str(found))

    def open_input_stream(self, path: str, compression: str | None = "detect", buffer_size: int | None = None) -> pa.NativeFile:
        """A file to read from its beginning, decompressed.

        Raises:
            OSError: It cannot be opened, or is outside of the read roots.
        """
        if compression == "detect":     # by the name that the user sees
            compression = _CODECS.get(PurePosixPath(path).suffix)
        with opened(Path(path)) as found:
            return self._system.open_input_stream(str(found), compression=compression, buffer_size=buffer_size)
