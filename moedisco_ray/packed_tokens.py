"""Packed tokens on disk, windows over them, and the order in which training visits the windows.

A packed directory holds documents as one stream of token ids. An end-of-sequence token follows each document, and a
beginning-of-sequence token precedes it if the tokenizer adds one:

    *.npy        1-D little-endian uint16, or uint32 for a vocabulary above 65,536 entries
    *.mask       one bit per token of the file of the same name: whether the loss counts it; absent if all tokens count
    index.json   {"tokens", "documents", "dtype", "parts"}, and "masked", the parts with a mask, if any has one

Shapes: L sequence length, N documents.
"""

from __future__ import annotations

import functools
import io
import json
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.core.store.run_store import SHARED, RunStore

Ids = NDArray[np.integer[Any]]

INDEX = "index.json"
_HEADER_BYTES = 128
"""Size of the header that numpy writes to a file of one axis (bytes)."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned integer type for ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Piece(NamedTuple):
    """One written file of packed tokens. File names sort in the order of the stream.

    Attributes:
        name: Name of the file.
        documents: Number of documents in the file.
        tokens: Number of tokens in the file, with special tokens.
        masked: Whether the file has a loss mask next to it.
    """

    name: str
    documents: int
    tokens: int
    masked: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the piece's files."""
        return (self.name, _mask_name(self.name)) if self.masked else (self.name,)


class LossMask(NamedTuple):
    """The tokens of some documents that the loss counts.

    Attributes:
        ids: Whether each token counts, for all documents, one after the other.
        special: Whether the end-of-sequence and beginning-of-sequence tokens of each document count [N].
    """

    ids: NDArray[np.bool_]
    special: NDArray[np.bool_]


def write_packed(
    directory: Path, parts: Iterable[Iterable[Ids]], eos: int, vocab_size: int, bos: int | None = None
) -> dict[str, Any]:
    """Write documents as packed tokens; memory is bounded by one part.

    Args:
        directory: Target directory; created if missing.
        parts: Token ids of the documents of each part, without end-of-sequence tokens. A part without documents gets no
            file.
        eos: Token that ends each document.
        vocab_size: Upper bound of the ids (exclusive); decides the type on disk.
        bos: Token that begins each document; None if there is no such token.

    Returns:
        The written index; see `write_index`.

    Raises:
        CorpusError: An id does not fit the vocabulary.
    """
    directory.mkdir(parents=True, exist_ok=True)
    pieces: list[Piece] = []
    for part in parts:
        if documents := list(part):
            lengths = np.array([len(document) for document in documents])
            path = directory / f"part-{len(pieces):05d}.npy"
            pieces.append(
                write_piece(path, np.concatenate(documents), lengths, eos=eos, vocab_size=vocab_size, bos=bos)
            )
    return write_index(directory, pieces, vocab_size)


def write_piece(
    path: Path,
    ids: Ids,
    lengths: NDArray[np.int64],
    *,
    eos: int,
    vocab_size: int,
    bos: int | None = None,
    mask: LossMask | None = None,
) -> Piece:
    """Write one file of packed tokens. A repeated call writes an identical file.

    Args:
        path: File to write; its directory must exist.
        ids: Token ids of all documents, one after the other, without special tokens.
        lengths: Number of ids of each document.
        eos: Token that ends each document.
        vocab_size: Upper bound of the ids (exclusive); decides the type on disk.
        bos: Token that begins each document; None if there is no such token.
        mask: The tokens that the loss counts; None if it counts all.

    Raises:
        CorpusError: An id does not fit the vocabulary.
    """
    stops = np.cumsum(lengths + (1 if bos is None else 2))
    special = [(eos, stops - 1)] if bos is None else [(eos, stops - 1), (bos, stops - lengths - 2)]
    largest = max(int(ids.max(initial=0)), *(token for token, _ in special))
    if ids.min(initial=0) < 0 or largest >= vocab_size:
        raise CorpusError("tokenizer", largest, f"a token id is outside the vocabulary of {vocab_size}")
    packed = np.empty(int(stops[-1]) if len(stops) else 0, dtype=token_dtype(vocab_size))
    inside = np.ones(len(packed), dtype=bool)
    for token, places in special:
        inside[places] = False
        packed[places] = token
    packed[inside] = ids
    if mask is not None:
        counts = np.repeat(mask.special, lengths + len(special))
        counts[inside] = mask.ids
        _save(path.with_name(_mask_name(path.name)), np.packbits(counts))
    _save(path, packed)
    return Piece(path.name, len(lengths), len(packed), masked=mask is not None)


def write_index(directory: Path, pieces: Iterable[Piece], vocab_size: int) -> dict[str, Any]:
    """Write the index that makes the files of a directory one stream, in the order of their names.

    Returns:
        The written index: tokens (including special tokens), documents, dtype, parts.
    """
    ordered = sorted(pieces)
    index = {
        "tokens": sum(piece.tokens for piece in ordered),
        "documents": sum(piece.documents for piece in ordered),
        "dtype": token_dtype(vocab_size).name,
        "parts": [piece.name for piece in ordered],
    }
    if masked := [piece.name for piece in ordered if piece.masked]:
        index["masked"] = masked
    write_json(directory / INDEX, index)
    return index


def check_windows(tokens: int, sequence_length: int) -> None:
    """Check that a stream of tokens is long enough for one window.

    Raises:
        CorpusError: The stream is shorter than one window.
    """
    if tokens <= sequence_length:
        raise CorpusError(
            "corpus.sequence_length",
            sequence_length,
            f"there are only {tokens} tokens, too few for a sequence and its next token; add text or lower it",
        )


class TokenStream:
    """Packed directories as one stream of tokens in windows; files are memory-mapped, or read at the run's URI.

    Window i holds tokens i L to (i + 1) L inclusive. Neighbours share one token: the last target of one is the first
    input of the next. So every token but the stream's first is a target exactly once, except for a rest shorter than L
    at the end.

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
        self._parts: list[Ids | _TokensAtUri] = []
        self._masks: list[Ids | _TokensAtUri | None] = []
        self._store = store
        self._unverified: dict[int, tuple[Path, ...]] = {}
        store.fetch(*(directory / INDEX for directory in directories))
        for directory in directories:
            try:
                index = read_json(directory / INDEX)
                masked = frozenset(index.get("masked", ()))
                self._unverified |= {
                    number: (directory / name, *([directory / _mask_name(name)] if name in masked else []))
                    for number, name in enumerate(index["parts"], start=len(self._parts))
                }
                self._parts += [_open(directory / name, store) for name in index["parts"]]
                self._masks += [
                    _open(directory / _mask_name(name), store) if name in masked else None for name in index["parts"]
                ]
            except (OSError, KeyError, json.JSONDecodeError) as error:
                remedy = f"holds no packed tokens ({error}); remove it and run again"
                raise CorpusError(str(directory), None, remedy) from error
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        check_windows(self.tokens, sequence_length)

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return int(self._starts[-1])

    @property
    def masked(self) -> bool:
        """Whether the loss leaves out some of the tokens."""
        return any(mask is not None for mask in self._masks)

    def __len__(self) -> int:
        return max(0, self.tokens - 1) // self.sequence_length

    def window(self, i: int) -> NDArray[np.int64]:
        """Token ids [L + 1] of window i: inputs are `w[:-1]`, targets `w[1:]`.

        Raises:
            IndexError: No window has this index.
        """
        start, count = self._range(i)
        ids = np.empty(count, dtype=np.int64)
        for filled, part, places in self._spans(start, count):
            ids[filled] = self._parts[part][places]
        return ids

    def loss_mask(self, i: int) -> NDArray[np.bool_]:
        """Whether the loss counts each target [L] of window i.

        Raises:
            IndexError: No window has this index.
        """
        start, count = self._range(i)
        counts = np.ones(count - 1, dtype=np.bool_)
        for filled, part, places in self._spans(start + 1, count - 1):
            if (mask := self._masks[part]) is not None:
                first = places.start // 8
                bits = np.unpackbits(np.asarray(mask[first : -(-places.stop // 8)], dtype=np.uint8))
                counts[filled] = bits[places.start - 8 * first : places.stop - 8 * first]
        return counts

    def _range(self, i: int) -> tuple[int, int]:
        """First token of window i, and its number of tokens."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return i * self.sequence_length, self.sequence_length + 1

    def _spans(self, start: int, count: int) -> Iterator[tuple[slice, int, slice]]:
        """Divide a range of the stream by files: places in the range, number of the file, and places in the file."""
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            offset = start + done - int(self._starts[part])
            size = min(count - done, len(self._parts[part]) - offset)
            # Only what is read is verified: a calibration samples a few windows of a large corpus.
            self._store.fetch(*(self._unverified.pop(part, ()) if not self._store.is_remote else ()))
            yield slice(done, done + size), part, slice(offset, offset + size)
            done += size
            part += 1


class _TokensAtUri:
    """Packed tokens in a file at a run's URI; slices are read in place.

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


def _mask_name(name: str) -> str:
    return f"{name.removesuffix('.npy')}.mask"


def _save(path: Path, values: Ids) -> None:
    # Each attempt of a task writes its own draft, because two attempts may write at the same time.
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    with draft.open("wb") as file:
        # `np.save` writes with `tofile`, whose error on a full disk has no `errno`.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(np.ascontiguousarray(values).data)
    draft.replace(path)


def _open(path: Path, store: RunStore) -> Ids | _TokensAtUri:
    if store.is_remote and not path.exists():
        return _TokensAtUri(path, store)
    found: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    return found


def _header(file: Any) -> tuple[int, np.dtype[Any], int]:
    """Number of tokens, their type, and where they begin, of an open .npy file."""
    head = io.BytesIO(file.read_at(_HEADER_BYTES, 0))
    np.lib.format.read_magic(head)
    (length,), _, dtype = np.lib.format.read_array_header_1_0(head)
    return length, dtype, head.tell()


def batch_indices(seed: int, step: int, batch: int, windows: int) -> NDArray[np.int64]:
    """Indices [batch] of the windows of a training step; they depend on the step alone, so that a resumed run is exact.

    Sample s = step * batch + j belongs to epoch s // windows and takes position s % windows in that epoch's permutation
    (Philox, key (seed, epoch)). So each epoch visits each window once, whatever the batch size.

    Args:
        seed: Seed of the data order.
        step: Step, counted from 0.
        batch: Sequences per step over all workers.
        windows: Number of windows in the stream.
    """
    samples = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, positions = np.divmod(samples, windows)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _permutation(seed, int(epoch), windows)[positions[here]]
    return chosen


@functools.lru_cache(maxsize=2)  # a step touches at most two epochs, unless the corpus is smaller than a batch
def _permutation(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(windows)
    order.flags.writeable = False
    return order
