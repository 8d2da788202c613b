"""Decide which documents are kept, held out and repeated: pure functions on tables of documents.

A decision depends on the texts and the settings only, never on the table in which a document is. A table holds either
all rows with an id or none of them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moedisco_ray.stages.corpus.documents import HELD_OUT, TRAINED, copies, id_matrix, is_validation, validation_hash

_HELD_OUT_HASH = -1.0
"""Validation hash of documents that an earlier run held out: below every real hash."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings that decide which documents are kept, held out and repeated.

    Attributes:
        names: Name of each input, in order.
        weights: Weight of each input.
        validation_fraction: Expected share of each input's documents that is held out.
        seed: Seed of the run.
        document_tokens: Maximum tokens of a document.
        smallest: Smallest validation hash of each input, from `extremes`; empty before all documents are known.
        largest: Largest validation hash of each input.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    validation_fraction: float
    seed: int
    document_tokens: int
    smallest: tuple[float, ...] = ()
    largest: tuple[float, ...] = ()

    def with_extremes(self, found_S2: NDArray[np.float64]) -> Rules:
        """A copy with the extremes of all documents; see `extremes`."""
        smallest, largest = found_S2.T.tolist()
        return dataclasses.replace(self, smallest=tuple(smallest), largest=tuple(largest))


def times(documents: pa.Table, rules: Rules) -> NDArray[np.int32]:
    """Occurrences of each training document per pass [n]; documents with none are left out of the corpus."""
    return copies(id_matrix(documents, "group"), np.array(rules.weights)[documents["order"].to_numpy()])


def extremes(documents: pa.Table, rules: Rules) -> NDArray[np.float64]:
    """Smallest and largest validation hash of each of S inputs in a table, [S, 2]; infinite without documents.

    Args:
        documents: Distinct documents with the columns id, group, order and side.
        rules: The settings.
    """
    wanted = times(documents, rules) > 0
    order, hashes = documents["order"].to_numpy()[wanted], _hashes(documents, rules)[wanted]
    found = np.full((len(rules.names), 2), [np.inf, -np.inf])
    np.minimum.at(found[:, 0], order, hashes)
    np.maximum.at(found[:, 1], order, hashes)
    return found


def split(documents: pa.Table, rules: Rules) -> pa.Table:
    """The documents that stay in the corpus, with the further columns `copies` and `held_out`.

    A validation document has one copy, whatever its source's weight. If a source is the corpus of an earlier run, the
    documents that the earlier run held out stay held out. If it held out any, the documents that it trained on stay in
    training.

    Args:
        documents: Distinct documents with the columns id, group, order and side.
        rules: The settings, with extremes.
    """
    order, side = documents["order"].to_numpy(), documents["side"].to_numpy()
    smallest, largest = np.array(rules.smallest)[order], np.array(rules.largest)[order]
    drawn = is_validation(_hashes(documents, rules), rules.validation_fraction, smallest, largest)
    held_out = (side == HELD_OUT) | (drawn & ~((side == TRAINED) & (smallest == _HELD_OUT_HASH)))
    found = times(documents, rules)
    wanted = found > 0
    found = np.where(held_out, np.minimum(found, 1), found).astype(np.int32)
    decided = documents.append_column("copies", pa.array(found)).append_column("held_out", pa.array(held_out))
    return decided.filter(pa.array(wanted))


def _hashes(documents: pa.Table, rules: Rules) -> NDArray[np.float64]:
    """Validation hash of each document; `_HELD_OUT_HASH` if an earlier run held it out."""
    hashes = validation_hash(id_matrix(documents, "group"), rules.seed)
    return np.where(documents["side"].to_numpy() == HELD_OUT, _HELD_OUT_HASH, hashes)
