"""List and open the files under a configured path: a local file, folder or glob, or any URI that pyarrow reads."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import fs

from moedisco_ray.core.config import Source
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.globs import Glob, matches_any
from moedisco_ray.core.limits import COMPRESSED, TEXT_PER_COMPRESSED
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.core.store.read_roots import Confinement, confinement, is_passed_over, opened
from moedisco_ray.core.store.remote import resolve
from moedisco_ray.stages.corpus.entries import count_entries
from moedisco_ray.stages.corpus.formats import NOTES, FileFormat, data_files, format_of, refusal, unknown
from moedisco_ray.stages.corpus.splits import CARD, SplitError, files_of_split
from moedisco_ray.stages.text.unseen import Skipped

_CARD_BYTES = 1 << 20
"""Maximum size of the beginning of a data set's card that is read (bytes)."""
_MARKERS = frozenset({"_SUCCESS", "_metadata", "_common_metadata"})
_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        files: Files to read, in the order of their paths.
        empty: Number of empty files, which are not in `files`.
        skipped: Files with unknown endings and missing files, if the source says `on_error: skip`.
        passed_over: Plain-text files that are not read because the folder also holds tables, JSON Lines or a saved data
            set.
    """

    files: tuple[File, ...]
    empty: int = 0
    skipped: tuple[Skipped, ...] = ()
    passed_over: tuple[Skipped, ...] = ()

    @property
    def text_bytes(self) -> int:
        """Estimated size of the text of all files, in bytes."""
        return sum(file.text_bytes for file in self.files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """One file to read.

    Attributes:
        path: Path within its file system.
        root: URI of the file system; None for the local one.
        size: Bytes on disk.
        mtime_ns: Time of the last change, nanoseconds since the epoch; 0 if the file system does not report it.
        own: Whether the run itself wrote the file. Such a file may be outside of the read roots.
    """

    path: str
    root: str | None
    format: FileFormat
    size: int
    mtime_ns: int
    own: bool = False

    @property
    def compressed(self) -> bool:
        """Whether the file's ending says that it is compressed. A compressed file can only be read from the start."""
        return self.path.endswith(COMPRESSED)

    @property
    def text_bytes(self) -> int:
        """Estimated size of the text in the file (bytes)."""
        return self.size * (TEXT_PER_COMPRESSED if self.compressed or self.format == "parquet" else 1)

    def file_system(self) -> Any:
        """File system that opens `path`: a pyarrow one, or `ConfinedFiles` for the user's local files."""
        system = resolve(self.path if self.root is None else self.root)[0]
        return system if self.own or self.root is not None else ConfinedFiles(system)


class ConfinedFiles:
    """A file system for local files inside the read roots.

    Each file is checked when it is opened; see `core.store.read_roots`.

    Args:
        system: The local file system.
    """

    def __init__(self, system: fs.LocalFileSystem) -> None:
        self._system = system

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open a file for random access.

        Raises:
            OSError: The file cannot be opened, or is outside of the read roots.
        """
        with opened(Path(path)) as found:
            return self._system.open_input_file(str(found))

    def open_input_stream(
        self, path: str, compression: str | None = "detect", buffer_size: int | None = None
    ) -> pa.NativeFile:
        """Open a file as a decompressed stream.

        Raises:
            OSError: The file cannot be opened, or is outside of the read roots.
        """
        if compression == "detect":  # judge by the configured name, because `opened` may yield a path without an ending
            compression = _CODECS.get(PurePosixPath(path).suffix)
        with opened(Path(path)) as found:
            return self._system.open_input_stream(str(found), compression=compression, buffer_size=buffer_size)


class _Found(NamedTuple):
    files: Sequence[tuple[Any, FileFormat]]
    skipped: Sequence[Skipped]
    passed_over: Sequence[Skipped]


def list_files(field: str, source: Source, *, own: bool = False, most_entries: int | None = None) -> Listing:
    """List all files under a source's path.

    With the format `auto` the file endings decide. In a folder with tables or JSON Lines, plain text (such as a README)
    is not read but listed in `Listing.passed_over`.

    Args:
        field: Configuration path of the source, such as `corpus.sources.0`; errors name it.
        source: The source. Its path is a file, a folder (read recursively), a glob (`*`, `**`, `[...]`, and `?` in
            local paths), or a URI of one of these.
        own: Whether the run itself wrote the files; all other files must be inside the read roots.
        most_entries: Maximum number of local files and folders to look at, which bounds the time; None for all.

    Raises:
        CorpusError: The path holds no files, cannot be read, or holds a file with an unknown ending.
        TooManyEntriesError: The path holds more than `most_entries`.
    """
    path, kind = source.path, source.format
    root = path if "://" in path else None
    try:
        system, place, pattern = _resolve(path, root)
        confined = None if own else confinement()
        excluded = _excluder(place, source.exclude)
        if root is None:
            budget = None if most_entries is None else iter(range(most_entries))
            infos = _Walk(system, pattern, excluded, confined, budget).files(place)
        else:
            infos = [info for info in _walk_uri(system, root, place, pattern, confined) if not excluded(info.path)]
        opener = system if root is not None or own else ConfinedFiles(system)
        if source.split is not None:
            infos = _of_split(opener, place, infos, source.split, source.subset)
        saved = kind in ("auto", "datasets") and pattern is None
        named = data_files(opener, field, path, [info.path for info in infos]) if saved else None
    except SplitError as error:
        raise CorpusError(f"{field}.split", source.split, f"is not in {path}: {error}") from error
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise CorpusError(f"{field}.path", path, f"cannot be read ({first_line(error)})") from error
    anchor = root if root is None or pattern is None else _before_wildcard(root)
    if named is not None:
        found = _data_set(source, field, infos, named, excluded)
    elif kind == "datasets":
        raise CorpusError(
            f"{field}.path", path, "is not a folder that save_to_disk wrote (it has no state.json); set format: auto"
        )
    elif kind == "auto":
        found = _by_ending(source, field, infos)
    else:
        found = _Found([(info, kind) for info in infos], [], [])
    files = tuple(
        File(path=info.path, root=anchor, format=form, size=info.size, mtime_ns=info.mtime_ns or 0, own=own)
        for info, form in sorted(found.files, key=lambda pair: pair[0].path)
        if info.size
    )
    if not files:
        first = next(iter(found.skipped), None)
        left_out = f", or only such as are left out: {first.path} {first.reason}" if first else ""
        raise CorpusError(
            f"{field}.path", path, f"holds no files, or only empty ones{left_out}; name a folder with text"
        )
    return Listing(files, len(found.files) - len(files), tuple(found.skipped), tuple(found.passed_over))


def digest(files: Iterable[File]) -> str:
    """Digest of the files' names, sizes and modification times."""
    listing = [[file.root, file.path, file.format, file.size, file.mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _resolve(path: str, root: str | None) -> tuple[Any, str, Glob | None]:
    # a URI's options follow a `?`
    searched, wildcards = (path.partition("?")[0], "*[") if root is not None else (path, "*?[")
    first = min((searched.index(sign) for sign in wildcards if sign in searched), default=None)
    if root is None:
        full = str(Path(path).absolute())
        base = full if first is None else str(Path(path[:first] + "_").absolute().parent)
        return (*resolve(Path(base)), None if first is None else Glob.of(full))
    if first is None:
        return (*resolve(root), None)
    pattern, sign, options = path.partition("?")
    stem, slash, last = pattern[:first].rpartition("/")
    system, place = resolve(stem + sign + options)
    return system, place, Glob.of(place.rstrip("/") + slash + last + pattern[first:])


def _before_wildcard(uri: str) -> str:
    """The URI without everything from its first wildcard to the `?`; the options after the `?` stay."""
    pattern, sign, options = uri.partition("?")
    return pattern[: min(pattern.index(wildcard) for wildcard in "*[" if wildcard in pattern)] + sign + options


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How to list the local files of a source.

    Attributes:
        pattern: The glob that files match; None for all files.
        excluded: Whether a path is left out.
        confined: The places that may be read; None for all. Hidden and denied places are left out, but a link that
            leads out of the roots is an error: the text behind it would be missed.
        budget: Yields once for each entry that may still be looked at; None for any number.
    """

    system: fs.LocalFileSystem
    pattern: Glob | None
    excluded: Callable[[str], bool]
    confined: Confinement | None
    budget: Iterator[int] | None = None

    def files(self, place: str) -> list[Any]:
        """The files at a place or below it.

        Raises:
            OSError: The place does not exist, or the place or a link leads out of the read roots.
        """
        self._check(place)
        found = _chosen(self.system.get_file_info(place), self.pattern, lambda: self._below(place))
        infos = [info for info in found if not self.excluded(info.path)]
        for info in infos:
            self._check(info.path)
        return infos

    def _below(self, folder: str, above: Sequence[Path] = ()) -> Iterator[Any]:
        """The files below a folder, also through links to other folders."""
        real = Path(os.path.realpath(folder))
        if real in above:  # a link to a folder above it would be followed for ever
            return
        count_entries(folder, self.budget)
        for info in self.system.get_file_info(fs.FileSelector(folder)):
            if info.base_name.startswith(".") or (
                self.confined is not None and is_passed_over(Path(info.path), real, self.confined)
            ):
                continue
            if info.type == fs.FileType.File:
                yield info
            elif info.type == fs.FileType.Directory and self._enters(info.path):
                yield from self._below(info.path, (*above, real))

    def _enters(self, folder: str) -> bool:
        if self.pattern is not None and not self.pattern.may_match_below(folder):
            return False
        try:
            self._check(folder)
        except OSError:
            if self.excluded(f"{folder}/_"):  # as any file in the folder would be
                return False
            raise
        return True

    def _check(self, path: str) -> None:
        if self.confined is not None:
            self.confined.check(Path(path))


def _walk_uri(system: Any, uri: str, place: str, pattern: Glob | None, confined: Confinement | None) -> list[Any]:
    """The files of a source at a URI. Files in denied places, such as other runs, are left out."""
    folder = (uri if pattern is None else _before_wildcard(uri).rpartition("/")[0]).partition("?")[0]
    depth = len(PurePosixPath(place).parts)

    def below() -> Iterator[Any]:
        for info in system.get_file_info(fs.FileSelector(place, recursive=True)):
            parts = PurePosixPath(info.path).parts[depth:]
            if not any(part.startswith(".") for part in parts) and (
                confined is None or confined.allows_uri("/".join((folder, *parts)))
            ):
                yield info

    if confined is not None and not confined.allows_uri(folder):
        raise PermissionError(errno.EACCES, "is in a folder of the service's runs; name a run as run://RUN/corpus")
    return _chosen(system.get_file_info(place), pattern, below)


def _chosen(top: Any, pattern: Glob | None, below: Callable[[], Iterable[Any]]) -> list[Any]:
    """The files that a pattern matches: `top` itself, or those below it."""
    if top.type == fs.FileType.NotFound:
        raise FileNotFoundError("no such file or folder")
    return [
        info
        for info in ([top] if top.type == fs.FileType.File else below())
        if info.type == fs.FileType.File
        and (info is top or info.base_name not in _MARKERS)
        and (pattern is None or pattern.matches(info.path))
    ]


def _of_split(opener: Any, place: str, infos: Sequence[Any], split: str, subset: str | None) -> list[Any]:
    """The files of a split of the data set in a folder, and the metadata files above them."""
    depth = len(PurePosixPath(place).parts)
    names = {"/".join(PurePosixPath(info.path).parts[depth:]): info for info in infos}
    card = None
    if CARD in names:
        with opener.open_input_stream(names[CARD].path) as stream:
            card = stream.read(_CARD_BYTES).decode(errors="replace")
    chosen = files_of_split([name for name in names if name != CARD], split, subset, card)
    return [info for name, info in names.items() if name in chosen]


def _data_set(
    source: Source, field: str, infos: Iterable[Any], named: Iterable[str], excluded: Callable[[str], bool]
) -> _Found:
    """Find the files to read in a folder with saved data sets: the Arrow files with the paths `named`.

    Other text is not read.
    """
    by_path = {info.path: info for info in infos}
    wanted = [path for path in named if not excluded(path)]
    missing = [path for path in wanted if path not in by_path]
    if missing and source.on_error == "fail":
        raise CorpusError(
            f"{field}.path",
            missing[0],
            "is missing, though the state.json next to it names it; save the data set again, or leave "
            "the file out by `exclude` or on_error: skip",
        )
    others = (
        path
        for path, info in sorted(by_path.items())
        if info.size and PurePosixPath(path).name not in NOTES and format_of(path) not in (None, "arrow")
    )
    return _Found(
        [(by_path[path], "arrow") for path in wanted if path in by_path],
        [Skipped(path, "is missing") for path in missing],
        [Skipped(path, "is next to a saved data set") for path in others],
    )


def _by_ending(source: Source, field: str, infos: Iterable[Any]) -> _Found:
    found: list[tuple[Any, FileFormat]] = []
    skipped: list[Skipped] = []
    for info in sorted(infos, key=lambda info: info.path):
        form = format_of(info.path)
        if form is not None:
            found.append((info, form))
        elif source.on_error == "skip":
            skipped.append(Skipped(info.path, unknown(info.path)))
        else:
            raise CorpusError(f"{field}.path", info.path, refusal(info.path))
    if all(form == "text" for _, form in found):
        return _Found(found, skipped, [])
    passed_over = [
        Skipped(info.path, "is plain text next to tables") for info, form in found if form == "text" and info.size
    ]
    return _Found([(info, form) for info, form in found if form != "text"], skipped, passed_over)


def _excluder(place: str, patterns: Iterable[str]) -> Callable[[str], bool]:
    """A predicate over paths: true for the excluded ones.

    A pattern without a slash is matched with the file's name, any other with the path below the source's folder.
    """
    names = [Glob.of(pattern) for pattern in patterns if "/" not in pattern]
    paths = [Glob.of(pattern.lstrip("/")) for pattern in patterns if "/" in pattern]
    depth = len(PurePosixPath(place).parts)

    def excluded(path: str) -> bool:
        parts = PurePosixPath(path).parts
        return matches_any(names, parts[-1]) or matches_any(paths, "/".join(parts[depth:]))

    return excluded
