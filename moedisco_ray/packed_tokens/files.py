"""Write packed tokens."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.packed_tokens.best_fit import best_fit

Ids = NDArray[np.integer[Any]]

INDEX = "index.json"
VERSION = 2
"""Version of packed directories that are written now; see the package's docstring."""
_ROOM = 1 / 32
"""Share of a window that is free, from which on the window is joined with others."""
_MOST_LOOSE = 64
"""Maximum number of such windows of a piece: the driver and the index hold them, however many documents there are."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned integer type for ids below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Piece(NamedTuple):
    """One written file of packed tokens. File names sort in the order of the stream.

    Attributes:
        name: Name of the file.
        documents: Number of documents in the file.
        tokens: Number of tokens in the file, with special tokens.
        windows: Number of windows of conversations; 0 for running text.
        loose: Number of tokens of the last windows, which have room for windows of other pieces, longest first.
        cut: Number of conversations that are longer than a window.
        left_out: Number of their tokens that did not fit, and are not in the file.
    """

    name: str
    documents: int
    tokens: int
    windows: int = 0
    loose: tuple[int, ...] = ()
    cut: int = 0
    left_out: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the piece's files; none if it has no documents."""
        if not self.documents:
            return ()
        shared = (self.name, starts_name(self.name))
        return (*shared, mask_name(self.name), windows_name(self.name)) if self.windows else shared


def write_packed(
    directory: Path, parts: Iterable[Iterable[Ids]], eos: int, vocab_size: int, bos: int | None = None
) -> dict[str, Any]:
    """Write documents as packed tokens of running text; memory is bounded by one part.

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
    path: Path, ids: Ids, lengths: NDArray[np.int64], *, eos: int, vocab_size: int, bos: int | None = None
) -> Piece:
    """Write one file of packed tokens of running text. A repeated call writes an identical file.

    Args:
        path: File to write; its directory must exist.
        ids: Token ids of all documents, one after the other, without special tokens.
        lengths: Number of ids of each document.
        eos: Token that ends each document.
        vocab_size: Upper bound of the ids (exclusive); decides the type on disk.
        bos: Token that begins each document; None if there is no such token.

    Raises:
        CorpusError: An id does not fit the vocabulary.
    """
    stops = np.cumsum(lengths + (1 if bos is None else 2))
    special = [(eos, stops - 1)] if bos is None else [(eos, stops - 1), (bos, stops - lengths - 2)]
    _check_ids(ids, [token for token, _ in special], vocab_size)
    packed = np.empty(int(stops[-1]) if len(stops) else 0, dtype=token_dtype(vocab_size))
    inside = np.ones(len(packed), dtype=bool)
    for token, places in special:
        inside[places] = False
        packed[places] = token
    packed[inside] = ids
    _save_bits(path.with_name(starts_name(path.name)), len(packed), special[-1][1])
    _save(path, packed)
    return Piece(path.name, len(lengths), len(packed))


def write_conversations(
    path: Path,
    ids: Ids,
    mask: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    *,
    length: int,
    vocab_size: int,
    bos: int | None = None,
) -> Piece:
    """Write one file of conversations, whole in windows of `length` + 1 tokens. A repeated call writes the same bytes.

    Of a conversation that is longer than a window, the window's first tokens are kept. One without a token that the
    loss counts, after its first token, is left out.

    Args:
        path: File to write; its directory must exist.
        ids: Token ids of all conversations, one after the other, without the beginning-of-sequence token.
        mask: Whether the loss counts each id.
        lengths: Number of ids of each conversation.
        length: Sequence length L.
        vocab_size: Upper bound of the ids (exclusive); decides the type on disk.
        bos: Token that begins each conversation; None if there is no such token.

    Returns:
        The piece; without documents, and without files, if all conversations are left out.

    Raises:
        CorpusError: An id does not fit the vocabulary.
    """
    _check_ids(ids, [] if bos is None else [bos], vocab_size)
    if bos is not None:
        firsts = np.cumsum(lengths) - lengths
        ids, mask, lengths = np.insert(ids, firsts, bos), np.insert(mask, firsts, values=False), lengths + 1
    kept = np.minimum(lengths, length + 1)
    firsts = np.cumsum(lengths) - lengths
    counted = np.concatenate([[0], np.cumsum(mask)])
    # The first token has none before it that could predict it.
    chosen = np.flatnonzero(counted[firsts + kept] > counted[np.minimum(firsts + 1, firsts + kept)])
    used = np.zeros(len(lengths), dtype=np.int64)
    used[chosen] = kept[chosen]
    cut = lengths > length + 1
    shortened = Piece(path.name, 0, 0, cut=int(cut.sum()), left_out=int((lengths - used)[cut].sum()))
    if not len(chosen):
        return shortened
    window = best_fit(kept[chosen], length + 1)
    filled = np.bincount(window, weights=kept[chosen]).astype(np.int64)
    fullest = np.argsort(-filled, kind="stable")
    filled = filled[fullest]
    order = np.argsort(np.argsort(fullest)[window], kind="stable")
    document, sizes = chosen[order], kept[chosen][order]
    starts = np.cumsum(sizes) - sizes
    places = np.arange(int(sizes.sum())) + np.repeat(firsts[document] - starts, sizes)
    counts = mask[places]
    counts[starts] = False
    _save(path.with_name(mask_name(path.name)), np.packbits(counts))
    _save_bits(path.with_name(starts_name(path.name)), len(places), starts)
    _save(path.with_name(windows_name(path.name)), np.cumsum([0, *filled]).astype("<i8"))
    _save(path, ids[places].astype(token_dtype(vocab_size)))
    loose = filled[-_MOST_LOOSE:]
    loose = loose[loose <= (length + 1) * (1 - _ROOM)]
    return shortened._replace(
        documents=len(chosen), tokens=len(places), windows=len(filled), loose=tuple(loose.tolist())
    )


def write_index(directory: Path, pieces: Iterable[Piece], vocab_size: int, length: int = 0) -> dict[str, Any]:
    """Write the index that makes the files of a directory one stream, in the order of their names.

    Windows of conversations that have room are joined, so that many small files waste no more than one large file.

    Args:
        directory: Directory of the pieces.
        pieces: The pieces, in any order.
        vocab_size: Upper bound of the ids (exclusive).
        length: Sequence length of pieces with conversations.

    Returns:
        The written index: version, tokens (including special tokens), documents, dtype, parts; see the package's
        docstring.
    """
    ordered = sorted(piece for piece in pieces if piece.documents)
    index = {
        "version": VERSION,
        "tokens": sum(piece.tokens for piece in ordered),
        "documents": sum(piece.documents for piece in ordered),
        "dtype": token_dtype(vocab_size).name,
        "parts": [piece.name for piece in ordered],
    }
    if conversations := [piece for piece in ordered if piece.windows]:
        index["conversations"] = {piece.name: piece.windows - len(piece.loose) for piece in conversations}
        index["joined"] = _joined(conversations, length + 1)
    write_json(directory / INDEX, index)
    return index


def _joined(pieces: Sequence[Piece], capacity: int) -> list[list[tuple[str, int]]]:
    """Groups of windows that are together one window, each by the name of its file and its number there."""
    named = [
        (piece.name, piece.windows - len(piece.loose) + number)
        for piece in pieces
        for number in range(len(piece.loose))
    ]
    tokens = np.array([tokens for piece in pieces for tokens in piece.loose], dtype=np.int64)
    groups: dict[int, list[tuple[str, int]]] = {}
    for window, group in zip(named, best_fit(tokens, capacity).tolist(), strict=True):
        groups.setdefault(group, []).append(window)
    return list(groups.values())


def starts_name(name: str) -> str:
    """Name of the file of starts of a file of tokens."""
    return f"{name.removesuffix('.npy')}.starts"


def mask_name(name: str) -> str:
    """Name of the loss mask of a file of tokens."""
    return f"{name.removesuffix('.npy')}.mask"


def windows_name(name: str) -> str:
    """Name of the file of windows of a file of conversations."""
    return f"{name.removesuffix('.npy')}.windows.npy"


def _check_ids(ids: Ids, special: Sequence[int], vocab_size: int) -> None:
    largest = max(int(ids.max(initial=0)), *special, 0)
    if ids.min(initial=0) < 0 or largest >= vocab_size:
        raise CorpusError("tokenizer", largest, f"a token id is outside the vocabulary of {vocab_size}")


def _save_bits(path: Path, size: int, places: NDArray[np.int64]) -> None:
    bits = np.zeros(size, dtype=np.bool_)
    bits[places] = True
    _save(path, np.packbits(bits))


def _save(path: Path, values: Ids) -> None:
    # Each attempt of a task writes its own draft, because two attempts may write at the same time.
    draft = path.with_suffix(f".{uuid.uuid4().hex}")
    with draft.open("wb") as file:
        # `np.save` writes with `tofile`, whose error on a full disk has no `errno`.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
        file.write(np.ascontiguousarray(values).data)
    draft.replace(path)
