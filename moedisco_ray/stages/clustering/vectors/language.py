"""One small language model per cluster: smoothed bigrams, fitted by counting.

    p_k(b | a) = (n_k(a, b) + A p_k(b)) / (n_k(a) + A),     p_k(b) = (n_k(b) + B q(b)) / (n_k + B),

where q is the share of each token in all clusters, with one added to each count. This is Dirichlet smoothing (MacKay and Peto
1995): bigrams are smoothed towards the cluster's tokens, and these towards the tokens of all clusters. A hash maps pairs to 2^18
counters. Pairs that collide are counted together, so probabilities of rare pairs are a little too large, equally in all clusters.

Shapes: N documents, T tokens of all documents, V vocabulary (one entry stands for all unknown tokens), E clusters, H counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moedisco_ray.stages.clustering.grid import Array

_HASH_BITS = 18
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)     # Fibonacci hashing (Knuth, The Art of Computer Programming, 6.4)
_TO_TOKENS, _TO_ALL = 20.0, 200.0           # A and B in the formulas above


@dataclasses.dataclass(frozen=True)
class Text:
    """Beginnings of documents as flat arrays over all tokens.

    Attributes:
        document_T: Index of the document that each token belongs to.
        before_T: The token before each token; before a document's first token, the unknown token.
        token_T: Id of each token; ids outside the vocabulary are replaced by the unknown token.
        pair_T: Index of the counter for the pair of each token and the token before it.
        length_N: Number of tokens of each document.
    """

    document_T: Array
    before_T: Array
    token_T: Array
    pair_T: Array
    length_N: Array

    @classmethod
    def of(cls, tokens: Sequence[Array], vocabulary: int, most: int) -> Text:
        """Take the first `most` tokens of each document; ids of `vocabulary` - 1 and above become the unknown token."""
        heads = [document[:most] for document in tokens]
        length_N = np.array([len(head) for head in heads], dtype=np.int64)
        token_T = np.minimum(np.concatenate([np.empty(0, np.int64), *heads]).astype(np.int64), vocabulary - 1)
        before_T = np.roll(token_T, 1)
        before_T[(np.cumsum(length_N) - length_N)[length_N > 0]] = vocabulary - 1
        pair_T = ((before_T * vocabulary + token_T).astype(np.uint64) * _GOLDEN) >> np.uint64(64 - _HASH_BITS)
        return cls(np.repeat(np.arange(len(heads)), length_N), before_T, token_T, pair_T.astype(np.int64), length_N)


@dataclasses.dataclass(frozen=True)
class LanguageModels:
    """Language models of all clusters, stored as token counts. The counts of two disjoint sets of documents can be added.

    Attributes:
        token_EV: Count of each token, n_k(b).
        before_EV: Count of each token as the first of a pair, n_k(a).
        pair_EH: Count of each pair, n_k(a, b).
    """

    token_EV: Array
    before_EV: Array
    pair_EH: Array

    @classmethod
    def count(cls, text: Text, clusters_N: Array, clusters: int, vocabulary: int) -> LanguageModels:
        """Count the tokens and pairs of tokens in the documents of each cluster."""
        cluster_T = clusters_N[text.document_T]

        def per_cluster(index_T: Array, size: int) -> Array:
            return np.bincount(cluster_T * size + index_T, minlength=clusters * size).reshape(clusters, size)

        return cls(
            per_cluster(text.token_T, vocabulary), per_cluster(text.before_T, vocabulary),
            per_cluster(text.pair_T, 1 << _HASH_BITS))

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary, V."""
        return self.token_EV.shape[1]

    def costs(self, text: Text, counted_N: Array | None = None) -> Array:
        """Nats per token of each document in each cluster, float64 [N, E]; 0 for a document without tokens.

        Args:
            text: Beginnings of the documents.
            counted_N: Cluster of each document, if these models were fitted on the documents. A document's own counts are then
                subtracted from those of its cluster; otherwise every document would prefer the cluster that it is in.
        """
        all_V = self.token_EV.sum(axis=0) + 1.0
        all_V /= all_V.sum()
        own = _OwnCounts.of(text) if counted_N is not None else None
        costs_NE = np.zeros((len(text.length_N), len(self.token_EV)))
        for k, (token_V, before_V, pair_H) in enumerate(zip(self.token_EV, self.before_EV, self.pair_EH, strict=True)):
            token_T, before_T, pair_T = token_V[text.token_T], before_V[text.before_T], pair_H[text.pair_T]
            total_T: Array | int = token_V.sum()
            if own is not None and counted_N is not None:
                inside_T = (counted_N == k)[text.document_T]
                token_T, before_T, pair_T = (
                    counts_T - inside_T * own_T
                    for counts_T, own_T in zip((token_T, before_T, pair_T), own.counts, strict=True))
                total_T = total_T - inside_T * text.length_N[text.document_T]
            plain_T = (token_T + _TO_ALL * all_V[text.token_T]) / (total_T + _TO_ALL)
            nats_T = -np.log((pair_T + _TO_TOKENS * plain_T) / (before_T + _TO_TOKENS))
            costs_NE[:, k] = np.bincount(text.document_T, nats_T, minlength=len(costs_NE))
        return costs_NE / np.maximum(text.length_N, 1)[:, None]


@dataclasses.dataclass(frozen=True)
class _OwnCounts:
    """Counts within a document: for each token, how often it, the token before it, and their pair occur in the same document."""

    counts: tuple[Array, Array, Array]

    @classmethod
    def of(cls, text: Text) -> _OwnCounts:
        def within(index_T: Array) -> Array:
            size = int(index_T.max(initial=0)) + 1
            _, place_T, counts = np.unique(text.document_T * size + index_T, return_inverse=True, return_counts=True)
            return counts[place_T]

        return cls((within(text.token_T), within(text.before_T), within(text.pair_T)))
