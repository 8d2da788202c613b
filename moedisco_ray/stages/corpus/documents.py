"""Identity and range of documents, detection of duplicates, validation split, and how often each document is repeated.

All of these depend only on the document's text (through its id) and the settings, never on where or when the document
was read. So the corpus does not depend on the number, size and order of the blocks in which it was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moedisco_ray.core.limits import RANGE_BYTES
from moedisco_ray.stages.text.cutting import Document

Ids = NDArray[np.uint8]
"""Document ids [n, 16]."""

ID_BYTES = 16
STAGED = pa.schema(
    [
        ("id", pa.binary(ID_BYTES)),
        ("group", pa.binary(ID_BYTES)),
        ("order", pa.int32()),
        ("side", pa.int8()),
        ("text", pa.large_string()),
        ("tokens", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)
"""Schema of documents as read.

- `order`: the position of the document's source in the configuration
- `group`: the id of the first document of its group (the parts of one long document, or neighbours in a running text);
  the validation split and the copies are decided per group
- `side`: the side of an earlier run's validation split: `TRAINED`, `HELD_OUT`, or `NEW` without an earlier run
- `tokens`: given token ids; null if the text is still to be encoded
- `loss_mask`: as in `DOCUMENTS`
"""
NEW, TRAINED, HELD_OUT = range(3)
DOCUMENTS = pa.schema(
    [
        ("id", pa.binary(ID_BYTES)),
        ("source", pa.string()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("packed", pa.int32()),
        ("copies", pa.int32()),
        ("group", pa.binary(ID_BYTES)),
        ("held_out", pa.bool_()),
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)
"""Schema of the finished corpus.

- `id`: the hash of the text; the parts of a document with too many tokens have its id and the ids that follow
- `tokens`: token ids without special tokens
- `packed`: number of tokens with the special tokens that training adds: BOS, if the tokenizer does, and EOS after
  running text
- `copies`: occurrences of the document in one pass
- `group`, `held_out`: group and side of the validation split, which stay the same when another run reads this corpus
- `loss_mask`: whether the loss counts each token of a document that is trained on as a whole, such as a conversation;
  null for running text, where it counts all
"""

_SMALL_RANGE_BYTES = 2 << 20
"""Minimum bytes of text per range. A small corpus is divided down to this size, so that several cores can work on
it."""
_FEW_RANGES = 8
"""Maximum number of ranges smaller than `RANGE_BYTES`."""
_MOST_RANGES = 4096
"""Maximum number of ranges: a shuffle has as many objects as ranges times tasks that divide rows."""
_COPIES_SALT = 0
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def document_id(text: str) -> bytes:
    """Blake2b-128 of the text in UTF-8. Documents with equal texts have equal ids."""
    return hashlib.blake2b(text.encode(), digest_size=ID_BYTES).digest()


def staged_table(documents: Sequence[Document], order: int, group: bytes = b"") -> pa.Table:
    """Documents of one source as a table with the schema `STAGED`.

    Args:
        documents: Documents as read.
        order: Position of their source in the configuration.
        group: Group of the leading documents, up to the first document that begins a new group.
    """
    ids = [document_id(document.text) for document in documents]
    return pa.table(
        [
            id_column(b"".join(ids)),
            id_column(b"".join(_groups(ids, documents, group))),
            pa.array(np.full(len(documents), order, dtype=np.int32)),
            pa.array([_side(document) for document in documents], pa.int8()),
            pa.array([document.text for document in documents], pa.large_string()),
            pa.array([document.tokens for document in documents], STAGED.field("tokens").type),
            pa.array([document.loss_mask for document in documents], STAGED.field("loss_mask").type),
        ],
        schema=STAGED,
    )


def id_column(ids: bytes) -> pa.Array:
    """A column of ids, from their concatenated bytes."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(ids) // ID_BYTES, [None, pa.py_buffer(ids)])


def id_matrix(table: pa.Table, name: str = "id") -> Ids:
    """A table's column of ids as bytes [n, 16]."""
    column = table[name].combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    rows = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint8, count=len(chunk) * ID_BYTES, offset=chunk.offset * ID_BYTES)
        for chunk in chunks
        if len(chunk)
    ]
    return np.concatenate([np.empty(0, dtype=np.uint8), *rows]).reshape(-1, ID_BYTES)


def range_count(text_bytes: int) -> int:
    """Number of ranges of ids: one per 32 MB of text, or up to eight smaller ones, to use several cores."""
    return min(_MOST_RANGES, max(1, -(-text_bytes // RANGE_BYTES), min(_FEW_RANGES, text_bytes // _SMALL_RANGE_BYTES)))


def ranges_of(ids: Ids, count: int) -> NDArray[np.int64]:
    """Range [n] of each id, of equal ranges of ids in ascending order.

    Range r of R holds the ids with floor(u R / 2^32) = r, where u is the big-endian integer of the first four bytes.
    """
    prefix = np.ascontiguousarray(ids[:, :4]).view(">u4")[:, 0].astype(np.uint64)
    return ((prefix * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def dedupe_and_sort(table: pa.Table) -> pa.Table:
    """Keep one row per id, sorted by id.

    Of equal documents, the one from the earliest source is kept; within a source, the one with the lowest group. The
    kept document is held out if an earlier run held out any of the equal ones.
    """
    ids = id_matrix(table)
    high, low = _words(ids)
    order = np.lexsort((*_words(id_matrix(table, "group"))[::-1], table["order"].to_numpy(), low, high))
    high, low = high[order], low[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    found = table.take(pa.array(order[first]))
    if len(found):
        sides = np.maximum.reduceat(table["side"].to_numpy()[order], np.flatnonzero(first))
        found = found.set_column(found.schema.get_field_index("side"), STAGED.field("side"), pa.array(sides))
    return found


def is_validation(
    hashes: NDArray[np.float64],
    fraction: float,
    smallest: float | NDArray[np.float64] = -1.0,
    largest: float | NDArray[np.float64] = 1.0,
) -> NDArray[np.bool_]:
    """Mask [n] of the held-out documents: those with a group hash below `fraction`.

    Args:
        hashes: `validation_hash` of each document's group [n].
        fraction: Expected share of held-out documents.
        smallest: Smallest hash in each document's source. The group with this hash is always held out, so that a small
            source has validation documents too.
        largest: Largest hash in each document's source. The group with this hash is never held out, so that the source
            has training documents.
    """
    return ((hashes < fraction) | (hashes == smallest)) & (hashes != largest)


def validation_hash(ids: Ids, seed: int) -> NDArray[np.float64]:
    """Hash of each group as a number in [0, 1), for `is_validation`. Another seed holds out other documents."""
    return _uniform(ids, seed + 1)


def copies(ids: Ids, weight: float | NDArray[np.float64]) -> NDArray[np.int32]:
    """Occurrences of each document [n] per pass: floor(weight), plus one with probability weight - floor(weight).

    A hash of the id decides, so the mean over documents is `weight` and the outcome never changes. A document with no
    copy is left out of the corpus.

    Args:
        ids: Ids of the documents' groups [n, 16].
        weight: Weight of the documents' source, or of each document's source [n].
    """
    whole = np.floor(weight)
    return np.asarray(whole + (_uniform(ids, _COPIES_SALT) < weight - whole), dtype=np.int32)


def part_id(whole: bytes, number: int) -> bytes:
    """Id of part `number` of a document; see `following_ids`."""
    return following_ids(np.frombuffer(whole, np.uint8).reshape(1, ID_BYTES), np.array([number])).tobytes()


def following_ids(ids: Ids, numbers: NDArray[np.int64]) -> Ids:
    """Add a small number [n] to each id [n, 16]; the sum stays in the id's range and below the next document's id."""
    high, low = _words(ids)
    following = np.stack([high, low + numbers.astype(np.uint64)], axis=1)
    return np.ascontiguousarray(following.astype(">u8")).view(np.uint8)


def _groups(ids: Sequence[bytes], documents: Sequence[Document], group: bytes) -> Iterator[bytes]:
    for each, document in zip(ids, documents, strict=True):
        if document.kept is not None:
            group = document.kept.group
        elif document.begins:
            group = each
        yield group


def _side(document: Document) -> int:
    if document.kept is None:
        return NEW
    return HELD_OUT if document.kept.held_out else TRAINED


def _words(ids: Ids) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    words = np.ascontiguousarray(ids).view(">u8").astype(np.uint64)
    return words[:, 0], words[:, 1]


def _uniform(ids: Ids, salt: int) -> NDArray[np.float64]:
    # The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over the id's second half; the first half picks the
    # range.
    x = _words(ids)[1] + np.uint64((salt * _GOLDEN + _GOLDEN) & _MASK64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
