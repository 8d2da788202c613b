"""Find near duplicates by MinHash and locality-sensitive hashing (Broder 1997; Indyk and Motwani 1998).

A document counts as the set of its runs of five words. Its *sketch* holds 128 minimal hashes of this set. The share of
equal hashes in two sketches estimates the Jaccard similarity of the two documents. A sketch is divided into *bands* of
consecutive hashes, and a hash of a band is its *key*. Documents that are similar enough almost surely have a key in
common. So every document is listed under the key of each of its bands, and only documents with a common key are
compared.

The first tasks list the documents of one bucket (a range of ids) each under their keys. The second tasks compare the
documents of one range of keys each. The third tasks finish one bucket each, without the near duplicates that the second
tasks found in it. No task holds more than one bucket or range, and the result does not depend on their number.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rensa import RMinHash

from moedisco_ray.stages.corpus.documents import HELD_OUT, ID_BYTES, Ids, id_column, id_matrix

_HASHES = 128
"""Hashes of a sketch: a similarity of 0.8 is estimated with a standard error of 0.035."""
_SEED = 1
_WORDS = 5
_RECALL = 0.99
"""Minimum probability that two documents with exactly the wanted similarity are compared."""
_BYTE_CHANCE = 1 / 256
"""Probability that two different hashes end in the same byte. Lists store only the last byte of a hash (Li and König
2010)."""
_KEYS_BYTES = 128 << 20
"""Target size of the list that one task compares (bytes). The list holds a key, an id and a sketch for each of its
entries."""
_CHUNK = 4096
"""Number of documents that are sketched at once."""
_COMPARED = 64
"""Number of first documents under a key with which all later ones are compared. It limits the work on text that many
share."""
_WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff]|[^\\W\u3040-\u30ff\u3400-\u9fff]+")
"""Matches a word. Chinese and Japanese have no spaces, so each of their characters counts as a word."""

LISTED = pa.schema(
    [("key", pa.uint64()), ("rank", pa.int32()), ("id", pa.binary(ID_BYTES)), ("sketch", pa.binary(_HASHES))]
)
"""Schema of documents listed under the keys of their bands. Of similar documents, the one with the lowest rank and id
stays."""
DROPPED = pa.schema([("id", pa.binary(ID_BYTES))])


@dataclasses.dataclass(frozen=True)
class Banding:
    """Division of a sketch into bands.

    Attributes:
        similarity: Minimum Jaccard similarity of near duplicates.
        rows: Hashes per band.
        bands: Number of bands.
    """

    similarity: float
    rows: int
    bands: int

    @classmethod
    def of(cls, similarity: float) -> Banding:
        """The longest bands with which hardly any similar documents are missed; longer bands need fewer comparisons."""
        fitting = [rows for rows in range(1, _HASHES + 1) if 1 - (1 - similarity**rows) ** (_HASHES // rows) >= _RECALL]
        rows = max(fitting, default=1)
        return cls(similarity, rows, _HASHES // rows)

    def key_buckets(self, documents: int) -> int:
        """Number of ranges into which the keys of this many documents are divided."""
        listed = documents * self.bands * (_HASHES + ID_BYTES + 12)
        return max(1, -(-listed // _KEYS_BYTES))

    def keys(self, hashes_NH: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Key of each band of each sketch, uint64 [N, bands]."""
        keys_NB = np.tile(np.arange(self.bands, dtype=np.uint64), (len(hashes_NH), 1))
        banded_NBR = hashes_NH[:, : self.bands * self.rows].reshape(-1, self.bands, self.rows)
        for row in range(self.rows):
            keys_NB = _mix(keys_NB ^ banded_NBR[:, :, row])
        return keys_NB


def shingles(text: str) -> list[str]:
    """The runs of five words of a text, or the text itself if it has fewer words."""
    words = _WORD.findall(text.casefold())
    if len(words) < _WORDS:
        return [" ".join(words) or text]
    return [" ".join(words[i : i + _WORDS]) for i in range(len(words) - _WORDS + 1)]


def sketches(texts: list[str]) -> NDArray[np.uint32]:
    """Sketch of each text: its 128 minimal hashes, uint32 [N, 128]."""
    rows = RMinHash.digest_matrix_from_token_sets([shingles(text) for text in texts], _HASHES, _SEED).to_rows()
    return np.array(rows, dtype=np.uint32).reshape(-1, _HASHES)


def ranges_of_keys(table: pa.Table, count: int) -> NDArray[np.int64]:
    """Number of the range that each listed document's key is in, of equally wide ranges [n]."""
    keys = table["key"].to_numpy()
    return (((keys >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32)).astype(np.int64)


def listed(documents: pa.Table, banding: Banding) -> Iterator[pa.Table]:
    """List documents under the keys of their bands; yield the lists in tables of some 10 MB with the schema `LISTED`.

    Args:
        documents: Distinct documents with the columns id, order, side, text.
        banding: Division of the sketches into bands.
    """
    return (_listed(documents.slice(start, _CHUNK), banding) for start in range(0, len(documents), _CHUNK))


def repeated(table: pa.Table, banding: Banding) -> pa.Table:
    """Ids of the near duplicates among listed documents, with the schema `DROPPED`.

    A document is a near duplicate if it is similar enough to a document with a lower rank, or with an equal rank and a
    lower id. That other document may be a near duplicate too.

    Args:
        table: Documents as `listed` yields them: either all that have a key or none.
        banding: Division of the sketches into bands.
    """
    keys, rank = table["key"].to_numpy(), table["rank"].to_numpy()
    ids = id_matrix(table)
    order = np.lexsort((*ids.T[::-1], rank, keys))
    sketches_NH = _matrix(table["sketch"])
    dropped: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    starts = np.flatnonzero(np.diff(keys[order], prepend=np.uint64(0)) != 0) if len(order) else np.empty(0, np.int64)
    for start, stop in itertools.pairwise(sorted({0, *starts.tolist(), len(order)})):
        if stop - start > 1:
            rows = order[start:stop]
            dropped.append(rows[_repeats(sketches_NH[rows], banding.similarity)])
    found: Ids = np.unique(ids[np.concatenate(dropped)], axis=0)
    return pa.table([id_column(found.tobytes())], schema=DROPPED)


def without_ids(documents: pa.Table, ids: NDArray[np.void]) -> pa.Table:
    """The documents, except those with the given ids."""
    return documents.filter(pa.array(~np.isin(id_words(documents), ids)))


def id_words(table: pa.Table) -> NDArray[np.void]:
    """A table's ids as one array of 16-byte values [n]."""
    return np.ascontiguousarray(id_matrix(table)).view(np.dtype((np.void, ID_BYTES)))[:, 0]


def _repeats(sketches_NH: NDArray[np.uint8], similarity: float) -> NDArray[np.bool_]:
    """Whether each document is similar enough to an earlier one, bool [N]."""
    repeats_N = np.zeros(len(sketches_NH), dtype=bool)
    for i, earlier_H in enumerate(sketches_NH[:_COMPARED]):
        equal_N = (sketches_NH[i + 1 :] == earlier_H).mean(axis=1)
        repeats_N[i + 1 :] |= (equal_N - _BYTE_CHANCE) / (1 - _BYTE_CHANCE) >= similarity
    return repeats_N


def _listed(chunk: pa.Table, banding: Banding) -> pa.Table:
    hashes_NH = sketches(chunk["text"].to_pylist())
    rows = np.repeat(np.arange(len(chunk)), banding.bands)
    # A document that an earlier run held out has the lowest rank: it stays, and its near duplicates are dropped, not
    # trained on.
    rank = np.where(chunk["side"].to_numpy() == HELD_OUT, -1, chunk["order"].to_numpy()).astype(np.int32)
    sketch = hashes_NH.astype(np.uint8)  # the last byte of each hash
    return pa.table(
        [
            pa.array(banding.keys(hashes_NH).ravel()),
            pa.array(rank[rows]),
            id_column(id_matrix(chunk)[rows].tobytes()),
            pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(_HASHES), len(rows), [None, pa.py_buffer(sketch[rows].tobytes())]
            ),
        ],
        schema=LISTED,
    )


def _matrix(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    def rows() -> Iterator[NDArray[np.uint8]]:
        yield np.empty(0, dtype=np.uint8)
        for chunk in column.chunks:
            yield np.frombuffer(chunk.buffers()[1], np.uint8, count=len(chunk) * _HASHES, offset=chunk.offset * _HASHES)

    return np.concatenate(list(rows())).reshape(-1, _HASHES)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
