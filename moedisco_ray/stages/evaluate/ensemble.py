"""Sub-models as an ensemble that is never merged: c-BTM (Gururangan et al., arXiv 2303.14177, section 3.3).

    p(x_t | x_<t) = sum_k w_k(x_<t) p_k(x_t | x_<t),    w_k proportional to exp(-d_k^2 / tau)

with d_k the distance of the context x_<t from cluster k's centre; the cluster model returns d_k^2 as its cost. The
weights are computed anew every `ENSEMBLE_BLOCK` tokens, from the tokens before the block only. In the first block,
which has no context, they are equal.

Shapes: N documents, C clusters, B blocks of all documents, T tokens of one document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from moedisco_ray.core.limits import ENSEMBLE_BLOCK, ENSEMBLE_TEMPERATURE
from moedisco_ray.stages.scoring import counted_nats
from moedisco_ray.stages.text.validation import Documents

Floats = NDArray[np.float64]
Ids = NDArray[np.int32]
Distances = Callable[[Sequence[Ids]], Floats]
"""Function that takes the token ids of B contexts and returns their squared distances [B, C] from the clusters'
centres."""


def log_weights(d_BC: Floats) -> Floats:
    """Logarithms of w: the log-softmax of -d / tau, where `d_BC` are squared distances."""
    scores_BC = -d_BC / ENSEMBLE_TEMPERATURE
    return scores_BC - logsumexp(scores_BC, axis=1, keepdims=True)


def ensemble_nats(
    documents: Documents, nats_of: Iterator[list[Floats]], distances: Distances, *, block: int = ENSEMBLE_BLOCK
) -> Floats:
    """Negative log-likelihood of each document under the ensemble, float64 [N].

    Args:
        documents: N documents.
        nats_of: Yields one list per sub-model, with the nats of every token of each document. Each sub-model is
            evaluated when its list is requested.
        distances: Returns squared distances of contexts from the clusters' centres.
        block: Number of consecutive tokens predicted with the same weights.
    """
    log_w_NTC = [
        np.repeat(w_BC, block, axis=0)[: len(tokens)]
        for w_BC, tokens in zip(_weights(documents.tokens, distances, block), documents.tokens, strict=True)
    ]
    mixed_NT: list[Floats] = [np.full(len(tokens), -np.inf) for tokens in documents.tokens]
    for k, nats_NT in enumerate(nats_of):
        mixed_NT = [
            np.logaddexp(mixed_T, log_w_TC[:, k] - nats_T)
            for mixed_T, log_w_TC, nats_T in zip(mixed_NT, log_w_NTC, nats_NT, strict=True)
        ]
    return counted_nats([-mixed_T for mixed_T in mixed_NT], documents.loss_masks)


def _weights(tokens: Sequence[Ids], distances: Distances, block: int) -> list[Floats]:
    """Logarithms of w for every block of a document: one array [blocks, C] per document."""
    contexts = [document[:end] for document in tokens for end in range(block, len(document), block)]
    first = tokens[0][:1]  # if no document is longer than a block, this context only serves to find out C
    log_w_BC = log_weights(distances(contexts or [first]))
    equal_1C = np.full((1, log_w_BC.shape[1]), -np.log(log_w_BC.shape[1]))
    weights, start = [], 0
    for document in tokens:
        blocks = max(0, -(-len(document) // block) - 1)
        weights.append(np.concatenate([equal_1C, log_w_BC[start : start + blocks]]))
        start += blocks
    return weights
