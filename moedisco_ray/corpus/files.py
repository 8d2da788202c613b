"""What lies under a configured path: local files, folders and globs, and any URI that a pyarrow file system reads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs

from moedisco_ray.errors import CorpusError
from moedisco_ray.file_systems import first_line, resolve

FileFormat = Literal["text", "jsonl", "parquet", "arrow"]

_ENDINGS: dict[str, FileFormat] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow",
}
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4", ".br")
_MARKERS = frozenset({"_SUCCESS", "_metadata", "_common_metadata"})


@dataclasses.dataclass(frozen=True)
class File:
    """One file to read.

    Attributes:
        path: As its file system names it.
        root: The URI that finds the file system; None is the local one.
        format: How to read it.
        size: Bytes on disk.
        mtime_ns: When it was last written, nanoseconds since the epoch; 0 where the file system does not tell.
    """

    path: str
    root: str | None
    format: FileFormat
    size: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether its ending says that it must be decompressed, and so read from the start."""
        return self.path.endswith(_COMPRESSED)

    @property
    def text_bytes(self) -> int:
        """Bytes of text it may hold: text compresses about four to one."""
        return self.size * (4 if self.compressed or self.format == "parquet" else 1)

    def file_system(self) -> Any:
        """The pyarrow file system that reads `path`."""
        return resolve(self.path if self.root is None else self.root)[0]


def list_files(field: str, path: str, kind: str) -> tuple[File, ...]:
    """Everything to read under a path, in the order of the paths.

    Args:
        field: The configuration path of the source, such as `corpus.sources.0`; errors name it.
        path: A file, a folder (read recursively), a glob (`*`, `**`, `[...]`, and `?` in local paths), or a URI of
            these.
        kind: The source's format. With `auto` the endings decide, and where a folder holds Parquet or JSON Lines,
            other files beside them (a README) are not taken for text.

    Raises:
        CorpusError: Nothing is there, or the file system cannot be read.
    """
    root = path if "://" in path else None
    try:
        system, place, pattern = _resolve(path, root)
        infos = _walk(system, place, pattern)
        saved = kind in ("auto", "datasets") and pattern is None
        data_sets = _saved_data_sets(system, field, path, infos) if saved else None
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CorpusError(f"{field}.path", path, f"cannot be read ({first_line(error)})") from error
    anchor = root if root is None or pattern is None else root[:root.index(_first_wildcard(root))]
    if data_sets is not None:
        found = [(info, "arrow") for info in data_sets]
    elif kind == "datasets":
        raise CorpusError(f"{field}.path", path, "is not a folder that save_to_disk wrote (it has no state.json)")
    else:
        found = [(info, _format(info.path) if kind == "auto" else kind) for info in infos]
        if kind == "auto" and any(form != "text" for _, form in found):
            found = [(info, form) for info, form in found if form != "text"]
    files = tuple(
        File(info.path, anchor, form, info.size, info.mtime_ns or 0)  # type: ignore[arg-type]  # one of FileFormat by now
        for info, form in sorted(found, key=lambda pair: pair[0].path) if info.size)
    if not files:
        raise CorpusError(f"{field}.path", path, "holds no files, or only empty ones; name a folder with text")
    return files


def digest(files: Iterable[File]) -> str:
    """Identity of the files' contents, by name, size and time of writing."""
    listing = [[file.root, file.path, file.format, file.size, file.mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _resolve(path: str, root: str | None) -> tuple[Any, str, re.Pattern[str] | None]:
    wildcards = "*[" if root is not None else "*?["   # a URI's question mark begins its options
    first = min((path.index(sign) for sign in wildcards if sign in path), default=None)
    if root is None:
        full = str(Path(path).absolute())
        base = full if first is None else str(Path(path[:first] + "_").absolute().parent)
        return (*resolve(Path(base)), None if first is None else _glob(full))
    if first is None:
        return (*resolve(root), None)
    stem, slash, last = path[:first].rpartition("/")
    system, place = resolve(stem)
    return system, place, _glob(place.rstrip("/") + slash + last + path[first:])


def _first_wildcard(path: str) -> str:
    return min((sign for sign in "*[" if sign in path), key=path.index)


def _walk(system: Any, place: str, pattern: re.Pattern[str] | None) -> list[Any]:
    top = system.get_file_info(place)
    if top.type == fs.FileType.NotFound:
        raise FileNotFoundError("no such file or folder")
    if top.type == fs.FileType.File:
        return [top] if pattern is None or pattern.fullmatch(top.path) else []
    depth = len(PurePosixPath(place).parts)
    return [
        info for info in system.get_file_info(fs.FileSelector(place, recursive=True))
        if info.type == fs.FileType.File
        and not any(part.startswith(".") for part in PurePosixPath(info.path).parts[depth:])
        and info.base_name not in _MARKERS
        and (pattern is None or pattern.fullmatch(info.path))
    ]


def _saved_data_sets(system: Any, field: str, path: str, infos: list[Any]) -> list[Any] | None:
    # save_to_disk writes state.json beside a data set's Arrow files, and dataset_dict.json above the splits of several.
    by_path = {info.path: info for info in infos}
    dictionary = [info for info in infos if info.base_name == "dataset_dict.json"]
    states = [info for info in infos if info.base_name == "state.json"]
    if dictionary and states:
        folder = PurePosixPath(dictionary[0].path).parent
        splits = {PurePosixPath(info.path).parent.name: info for info in states}
        if "train" not in splits:
            listed = ", ".join(sorted(splits))
            raise CorpusError(f"{field}.path", path, f"holds the splits {listed}; name one, as {folder.name}/SPLIT")
        states = [splits["train"]]
    if not states:
        return None
    found = []
    for state in states:
        with system.open_input_stream(state.path) as stream:
            entries = json.loads(stream.read())["_data_files"]
        folder = PurePosixPath(state.path).parent
        found += [by_path[str(folder / entry["filename"])] for entry in entries]
    return found


def _format(path: str) -> FileFormat:
    name = PurePosixPath(path)
    ending = PurePosixPath(name.stem).suffix if name.suffix in _COMPRESSED else name.suffix
    return _ENDINGS.get(ending.lower(), "text")


def _glob(pattern: str) -> re.Pattern[str]:
    parts = {"**/": r"(?:[^/]+/)*", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    return re.compile("".join(
        parts.get(piece) or (piece.replace("[!", "[^") if piece[:1] == "[" and piece[-1:] == "]" else re.escape(piece))
        for piece in pieces))
