"""Windows over packed tokens."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.packed_tokens.files import INDEX, Ids, mask_name, starts_name, windows_name

_HEADER_BYTES = 128
"""Size of the header that numpy writes to a file of one axis (bytes)."""


def check_windows(tokens: int, sequence_length: int, *, conversations: bool = False) -> None:
    """Check that there is text for one window.

    Args:
        tokens: Number of tokens of running text.
        sequence_length: Sequence length.
        conversations: Whether there are conversations too, which always fill a window.

    Raises:
        CorpusError: The text is shorter than one window.
    """
    if tokens <= sequence_length and not conversations:
        raise CorpusError(
            "corpus.sequence_length",
            sequence_length,
            f"there are only {tokens} tokens, too few for a sequence and its next token; add text or lower it",
        )


def has_conversations(directory: Path) -> bool:
    """Whether windows of a packed directory hold whole conversations."""
    return bool(_index_of(directory).get("conversations"))


class TokenStream:
    """Packed directories as one sequence of windows; files are memory-mapped, or read at the run's URI.

    The windows of running text come first. Of them, window i holds tokens i L to (i + 1) L inclusive. Neighbours share
    one token: the last target of one is the first input of the next. So every token but the stream's first is a target
    exactly once, except for a rest shorter than L at the end. Then come the windows of conversations.

    Args:
        directories: Packed directories, in the order of the stream.
        sequence_length: Sequence length L.
        store: The run; of a run at a URI, only the windows that are asked for are read of files without a working copy.

    Raises:
        CorpusError: A directory holds no packed tokens, or the stream is shorter than one window.
        StorageError: The URI does not respond.
    """

    def __init__(self, directories: Sequence[Path], sequence_length: int, store: RunStore = SHARED) -> None:
        self.sequence_length = sequence_length
        self._store = store
        self._verified: set[str] = set()
        store.fetch(*(directory / INDEX for directory in directories))
        parts: list[_Part] = []
        self._joined: list[list[tuple[_Part, int]]] = []
        for directory in directories:
            index = _index_of(directory)
            try:
                opened = {name: _Part(directory / name, index, store) for name in index["parts"]}
                for group in index.get("joined", ()):
                    self._joined.append([(opened[name], window) for name, window in group])
                parts += opened.values()
            except (OSError, KeyError) as error:
                raise _no_tokens(directory, error) from error
        self._parts = [
            *(each for each in parts if each.windows is None),
            *(each for each in parts if each.windows is not None),
        ]
        self._running = sum(each.windows is None for each in parts)
        self._starts = np.cumsum([0, *(len(each.ids) for each in self._parts[: self._running])])
        counts = [*(each.alone for each in self._parts[self._running :]), len(self._joined)]
        self._firsts = np.cumsum([max(0, int(self._starts[-1]) - 1) // sequence_length, *counts])
        check_windows(int(self._starts[-1]), sequence_length, conversations=sum(counts) > 0)

    @property
    def masked(self) -> bool:
        """Whether the loss leaves out some of the tokens."""
        return any(part.mask is not None for part in self._parts)

    @property
    def without_starts(self) -> Path | None:
        """A file of tokens without a file of starts; None if all have one."""
        return next((part.path for part in self._parts if not part.has_starts), None)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def window(self, i: int) -> NDArray[np.int64]:
        """Token ids [L + 1] of window i: inputs are `w[:-1]`, targets `w[1:]`. Padding is 0.

        Raises:
            IndexError: No window has this index.
        """
        ids = np.zeros(self.sequence_length + 1, dtype=np.int64)
        for filled, part, places in self._spans(i):
            ids[filled] = part.ids[places]
        return ids

    def loss_mask(self, i: int) -> NDArray[np.bool_]:
        """Whether the loss counts each target [L] of window i.

        Raises:
            IndexError: No window has this index.
        """
        counts = np.zeros(self.sequence_length + 1, dtype=np.bool_)
        for filled, part, places in self._spans(i):
            counts[filled] = True if part.mask is None else _bits(part.mask, places)
        return counts[1:]

    def document_starts(self, i: int) -> NDArray[np.bool_]:
        """Whether a document begins at each input [L] of window i; padding counts as one.

        Raises:
            IndexError: No window has this index.
            ValueError: It is not stored where the documents begin.
        """
        starts, filled = np.zeros(self.sequence_length + 1, dtype=np.bool_), slice(0)
        for filled, part, places in self._spans(i):
            starts[filled] = _bits(part.starts, places)
        starts[filled.stop : filled.stop + 1] = True
        return starts[:-1]

    def filled(self, i: int) -> int:
        """Number of tokens of window i that are not padding, at most L + 1.

        Raises:
            IndexError: No window has this index.
        """
        return sum(places.stop - places.start for _, _, places in self._spans(i))

    def _spans(self, i: int) -> Iterator[tuple[slice, _Part, slice]]:
        """Divide a window by files: places in the window, file, and places in the file."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        done = 0
        if i >= self._firsts[0]:
            for part, window in self._together(i):
                start, stop = self._verify(part).window(window)
                yield slice(done, done + stop - start), part, slice(start, stop)
                done += stop - start
            return
        start, count = i * self.sequence_length, self.sequence_length + 1
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            part = self._verify(self._parts[number])
            offset = start + done - int(self._starts[number])
            size = min(count - done, len(part.ids) - offset)
            yield slice(done, done + size), part, slice(offset, offset + size)
            done += size
            number += 1

    def _together(self, i: int) -> list[tuple[_Part, int]]:
        """Files and numbers of the windows of conversations that are together window i."""
        number = int(np.searchsorted(self._firsts, i, side="right")) - 1
        window = i - int(self._firsts[number])
        if number == len(self._firsts) - 2:
            return self._joined[window]
        return [(self._parts[self._running + number], window)]

    def _verify(self, part: _Part) -> _Part:
        """Verify the files of a part once; only what is read: a calibration samples a few windows of a large corpus."""
        if not self._store.is_remote and str(part.path) not in self._verified:
            self._store.fetch(*part.files)
            self._verified.add(str(part.path))
        return part


class _Part:
    """A file of tokens, with the files next to it.

    Args:
        path: The file.
        index: Index of its directory.
        store: The run.

    Attributes:
        path: The file.
        ids: Its tokens.
        mask: Bits of its loss mask; None if all tokens count.
        windows: Places of its windows; None for running text.
        alone: Number of its windows that are not joined with others.
        has_starts: Whether it is stored where documents begin.
    """

    def __init__(self, path: Path, index: dict[str, Any], store: RunStore) -> None:
        self.path, self._store = path, store
        self.ids = _open(path, store)
        conversations = index.get("conversations", {})
        self.alone: int = conversations.get(path.name, 0)
        masked = path.name in conversations or path.name in index.get("masked", ())
        self.mask = _open(self._next(mask_name), store) if masked else None
        self.windows = _open(self._next(windows_name), store)[:] if path.name in conversations else None
        self.has_starts = "version" in index

    @functools.cached_property
    def starts(self) -> Ids | _ArrayAtUri:
        """Bits of its starts, opened when they are needed: most trainings need none.

        Raises:
            ValueError: They are not stored.
        """
        if not self.has_starts:
            raise ValueError(f"it is not stored where documents begin in {self.path}")
        return _open(self._next(starts_name), self._store)

    def window(self, number: int) -> tuple[int, int]:
        """First token of a window of conversations, and the one after its last."""
        assert self.windows is not None  # noqa: S101
        start, stop = self.windows[number : number + 2]
        return int(start), int(stop)

    @property
    def files(self) -> list[Path]:
        """All its files."""
        named = ((self.mask, mask_name), (self.windows, windows_name), (self.has_starts or None, starts_name))
        return [self.path, *(self._next(name) for held, name in named if held is not None)]

    def _next(self, name: Callable[[str], str]) -> Path:
        return self.path.with_name(name(self.path.name))


class _ArrayAtUri:
    """An array in a file at a run's URI; slices are read in place.

    Args:
        path: The file's place in the working copy.
        store: The run.
    """

    def __init__(self, path: Path, store: RunStore) -> None:
        self._path, self._store = path, store
        self._length, self._dtype, self._offset = store.read_in_place(path, _header)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, chosen: slice) -> Ids:
        start, stop, _ = chosen.indices(self._length)
        size, count = self._dtype.itemsize, max(0, stop - start)
        content = self._store.read_in_place(
            self._path, lambda file: file.read_at(count * size, self._offset + start * size)
        )
        return np.frombuffer(content, dtype=self._dtype, count=count)


def _open(path: Path, store: RunStore) -> Ids | _ArrayAtUri:
    if store.is_remote and not path.exists():
        return _ArrayAtUri(path, store)
    found: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def _header(file: Any) -> tuple[int, np.dtype[Any], int]:
    """Number of tokens, their type, and where they begin, of an open .npy file."""
    head = io.BytesIO(file.read_at(_HEADER_BYTES, 0))
    np.lib.format.read_magic(head)
    (length,), _, dtype = np.lib.format.read_array_header_1_0(head)
    return length, dtype, head.tell()


def _index_of(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(directory / INDEX)
    except (OSError, json.JSONDecodeError) as error:
        raise _no_tokens(directory, error) from error
    return found


def _no_tokens(directory: Path, error: Exception) -> CorpusError:
    return CorpusError(str(directory), None, f"holds no packed tokens ({error}); remove it and run again")


def _bits(bits: Ids | _ArrayAtUri, places: slice) -> NDArray[np.bool_]:
    """A range of single bits, of an array of bytes."""
    first = places.start // 8
    read = np.unpackbits(np.asarray(bits[first : -(-places.stop // 8)], dtype=np.uint8))
    return read[places.start - 8 * first : places.stop - 8 * first].astype(np.bool_)
