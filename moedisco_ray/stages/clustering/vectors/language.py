"""One small language model per cluster: smoothed bigrams, whose counts are all there is to train.

    p_k(b | a) = (n_k(a, b) + A p_k(b)) / (n_k(a) + A),     p_k(b) = (n_k(b) + B q(b)) / (n_k + B),

with q the tokens of all clusters, plus one each: Dirichlet smoothing (MacKay and Peto 1995), of bigrams towards the
cluster's own tokens and of these towards all. Pairs share 2^18 counters by a hash; what collides is counted together, so
that probabilities of rare pairs are a little too large, alike in all clusters.

Shapes: N documents, T tokens of them all, V vocabulary with one entry for every unknown token, E clusters, H counters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from moedisco_ray.stages.clustering.grid import Array

_HASH_BITS = 18
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)     # Fibonacci hashing (Knuth, The Art of Computer Programming, 6.4)
_TO_TOKENS, _TO_ALL = 20.0, 200.0           # A and B


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents' beginnings as one array, each token with the one before it.

    Attributes:
        document_T: Whose token it is.
        before_T: The token before; the document's first has the unknown one.
        token_T: Itself.
        pair_T: The counter of both together.
        length_N: Tokens of each document.
    """

    document_T: Array
    before_T: Array
    token_T: Array
    pair_T: Array
    length_N: Array

    @classmethod
    def of(cls, tokens: Sequence[Array], vocabulary: int, most: int) -> Text:
        """Read at most the first `most` tokens of each document; ids from `vocabulary` - 1 on are unknown."""
        heads = [document[:most] for document in tokens]
        length_N = np.array([len(head) for head in heads], dtype=np.int64)
        token_T = np.minimum(np.concatenate([np.empty(0, np.int64), *heads]).astype(np.int64), vocabulary - 1)
        before_T = np.roll(token_T, 1)
        before_T[(np.cumsum(length_N) - length_N)[length_N > 0]] = vocabulary - 1
        pair_T = ((before_T * vocabulary + token_T).astype(np.uint64) * _GOLDEN) >> np.uint64(64 - _HASH_BITS)
        return cls(np.repeat(np.arange(len(heads)), length_N), before_T, token_T, pair_T.astype(np.int64), length_N)


@dataclasses.dataclass(frozen=True)
class LanguageModels:
    """Counts of every cluster; those of disjoint sets of documents add up.

    Attributes:
        token_EV: n_k(b).
        before_EV: n_k(a), of tokens that another follows.
        pair_EH: n_k(a, b).
    """

    token_EV: Array
    before_EV: Array
    pair_EH: Array

    @classmethod
    def count(cls, text: Text, clusters_N: Array, clusters: int, vocabulary: int) -> LanguageModels:
        """Count the documents of each cluster."""
        cluster_T = clusters_N[text.document_T]

        def per_cluster(index_T: Array, size: int) -> Array:
            return np.bincount(cluster_T * size + index_T, minlength=clusters * size).reshape(clusters, size)

        return cls(
            per_cluster(text.token_T, vocabulary), per_cluster(text.before_T, vocabulary),
            per_cluster(text.pair_T, 1 << _HASH_BITS))

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.token_EV.shape[1]

    def costs(self, text: Text, counted_N: Array | None = None) -> Array:
        """Nats per token of each document in each cluster, float64 [N, E]; 0 for a document without tokens.

        Args:
            text: The documents.
            counted_N: The cluster that counted each document, where these models did: its own counts are then left out,
                for a document would else be likeliest wherever it is.
        """
        all_V = self.token_EV.sum(axis=0) + 1.0
        all_V /= all_V.sum()
        own = _Own.of(text) if counted_N is not None else None
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
class _Own:
    """How often each token's own document has the token, the token before it, and the pair."""

    counts: tuple[Array, Array, Array]

    @classmethod
    def of(cls, text: Text) -> _Own:
        def within(index_T: Array) -> Array:
            size = int(index_T.max(initial=0)) + 1
            _, place_T, counts = np.unique(text.document_T * size + index_T, return_inverse=True, return_counts=True)
            return counts[place_T]

        return cls((within(text.token_T), within(text.before_T), within(text.pair_T)))
