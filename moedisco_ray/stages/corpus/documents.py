"""Laws over documents: identity, bucket, duplicates, validation split, copies.

Each is a function of the document's text (through its id) and of the settings, never of where or when the document was
read: so the corpus is the same whatever the number, size and order of the blocks it was read in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moedisco_ray.stages.text.cutting import Document

Ids = NDArray[np.uint8]
"""Document ids [n, 16]."""

ID_BYTES = 16
STAGED = pa.schema([
    ("id", pa.binary(ID_BYTES)), ("group", pa.binary(ID_BYTES)), ("order", pa.int32()), ("side", pa.int8()),
    ("text", pa.large_string())])
"""A document as read; `order` is the place of its source in the configuration, `group` the id of the first document of its group
(the parts of one long document, or neighbours in a running text), which decides over the split and the copies; `side` is where an
earlier run put it: `NEW`, `TRAINED` or `HELD_OUT`."""
NEW, TRAINED, HELD_OUT = range(3)
DOCUMENTS = pa.schema([
    ("id", pa.binary(ID_BYTES)), ("source", pa.string()), ("text", pa.string()),
    ("tokens", pa.list_(pa.int32())), ("packed", pa.int32()), ("copies", pa.int32()),
    ("group", pa.binary(ID_BYTES)), ("held_out", pa.bool_()),
])
"""A document of the finished corpus. `tokens` has no special tokens; `packed` counts them and those that training puts before and
after them; `copies` is how often a pass holds it. Its id is the hash of its text; where a document turned out to have too many
tokens, its parts have its id and those that follow. `group` and `held_out` keep it on its side when another run reads it."""

_COPIES_SALT = 0
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


def document_id(text: str) -> bytes:
    """Blake2b-128 of the text in UTF-8: equal texts, and only they, are the same document."""
    return hashlib.blake2b(text.encode(), digest_size=ID_BYTES).digest()


def staged_table(documents: Sequence[Document], order: int, group: bytes = b"") -> pa.Table:
    """The table of documents that were read from source number `order`.

    Args:
        documents: As read.
        order: Number of their source.
        group: The group of those before the first that begins one.
    """
    ids = [document_id(document.text) for document in documents]
    return pa.table([
        id_column(b"".join(ids)),
        id_column(b"".join(_groups(ids, documents, group))),
        pa.array(np.full(len(documents), order, dtype=np.int32)),
        pa.array([_side(document) for document in documents], pa.int8()),
        pa.array([document.text for document in documents], pa.large_string()),
    ], schema=STAGED)


def id_column(ids: bytes) -> pa.Array:
    """Ids, one after the other, as a column."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ID_BYTES), len(ids) // ID_BYTES, [None, pa.py_buffer(ids)])


def id_matrix(table: pa.Table, name: str = "id") -> Ids:
    """A column of ids of a table as bytes [n, 16]."""
    column = table[name].combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    rows = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint8, count=len(chunk) * ID_BYTES, offset=chunk.offset * ID_BYTES)
        for chunk in chunks if len(chunk)
    ]
    return np.concatenate([np.empty(0, dtype=np.uint8), *rows]).reshape(-1, ID_BYTES)


def bucket_of(ids: Ids, buckets: int) -> NDArray[np.int64]:
    """Bucket [n] of each id: ids in ascending order fall into buckets in ascending order, evenly.

    Bucket b of B holds the ids whose first four bytes, as a big-endian integer u, give u B / 2^32 = b, rounded down.
    """
    prefix = np.ascontiguousarray(ids[:, :4]).view(">u4")[:, 0].astype(np.uint64)
    return ((prefix * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)


def dedupe_and_sort(table: pa.Table) -> pa.Table:
    """One row per id, sorted by id; of equal documents the one of the earliest source stays, in the lowest of its groups there.

    Where an earlier run held one of them out, it stays held out.
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
    hashes: NDArray[np.float64], fraction: float, smallest: float | NDArray[np.float64] = -1.0,
    largest: float | NDArray[np.float64] = 1.0,
) -> NDArray[np.bool_]:
    """Which documents [n] are held out: those whose group's hash falls below `fraction`.

    Args:
        hashes: `validation_hash` of each document's group [n].
        fraction: Expected share.
        smallest: The smallest hash of each document's source. Its group is held out in any case, so that a source of few
            documents has validation documents too.
        largest: The largest hash of each document's source. Its group never is, so that there are training documents too.
    """
    return ((hashes < fraction) | (hashes == smallest)) & (hashes != largest)


def validation_hash(ids: Ids, seed: int) -> NDArray[np.float64]:
    """The number in [0, 1) of each group that `is_validation` looks at. Another seed holds out other documents."""
    return _uniform(ids, seed + 1)


def copies(ids: Ids, weight: float | NDArray[np.float64]) -> NDArray[np.int32]:
    """How often each document [n] is seen per pass: floor(weight), and once more with the fraction's probability.

    The draw is a hash of the id, so that the expectation over documents is `weight` and the outcome never changes. A
    document with no copy is left out of the corpus.

    Args:
        ids: Ids of the documents' groups [n, 16].
        weight: Of the documents' sources.
    """
    whole = np.floor(weight)
    return np.asarray(whole + (_uniform(ids, _COPIES_SALT) < weight - whole), dtype=np.int32)


def part_id(whole: bytes, number: int) -> bytes:
    """The id of part `number` of a document, as `following_ids`."""
    return following_ids(np.frombuffer(whole, np.uint8).reshape(1, ID_BYTES), np.array([number])).tobytes()


def following_ids(ids: Ids, numbers: NDArray[np.int64]) -> Ids:
    """Each id [n, 16] plus a small number [n]; it stays in its bucket, and before the next id."""
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
    # The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over the id's second half; its first half picks the
    # bucket.
    x = _words(ids)[1] + np.uint64((salt * _GOLDEN + _GOLDEN) & _MASK64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
