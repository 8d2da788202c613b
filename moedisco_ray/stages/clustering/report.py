"""The cluster report: sizes, cohesion, typical words, examples, agreement with named sources, and a map.

Shapes: N documents, S documents of the sample, D dimensions, T terms, E clusters, P sources.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.metrics import mutual_info_score, silhouette_score

from moedisco_ray.stages.clustering.distances import Array, squared_distances
from moedisco_ray.stages.clustering.vectors.tfidf import vectorizer

_SILHOUETTE_SAMPLE = 3_000
"""Number of vectors for the silhouette. Its time and memory grow with the square of this number."""
_MAP_POINTS = 2_000
"""Number of documents on the map of the clusters."""
_TERMS = 10
"""Number of typical words of a cluster in the report."""
_EXAMPLES = 3
"""Number of example documents of a cluster in the report."""
_EXCERPT = 200
"""Maximum number of characters of an example document in the report."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sample documents that the report describes.

    Attributes:
        texts: Texts of the S documents.
        sources: Name of each document's source.
        x_SD: Vector of each document.
        clusters_S: Cluster of each document after balancing.
    """

    texts: Sequence[str]
    sources: Sequence[str]
    x_SD: Array
    clusters_S: Array


def cluster_report(
    sample: Sample, centroids_ED: Array | None, *, tokens_E: Array, documents_PE: Array
) -> dict[str, Any]:
    """Make the contents of `clusters/report.json`, except for the figures of k-means.

    Args:
        sample: Sample documents for words, examples, silhouette and map.
        centroids_ED: Centroids; None uses the mean of each cluster's sample vectors.
        tokens_E: Training tokens in each cluster, int64.
        documents_PE: Number of documents of each source in each cluster, int64.

    Returns:
        A dictionary with these keys:

        - `clusters`: one entry per cluster with `documents`, `tokens`, `terms`, `examples`
        - `balance`: tokens of the largest cluster divided by the mean
        - `silhouette`: mean silhouette of a part of the sample, in [-1, 1]; None if it is not defined
        - `nmi`: normalized mutual information of cluster and source, arithmetic mean; None with one source
        - `map`: coordinates `x` and `y`, `cluster` and `source` of each document on the map
    """
    E = len(tokens_E)
    documents_E = documents_PE.sum(axis=0)
    terms = top_terms(sample.texts, sample.clusters_S, E)
    examples = nearest_texts(sample, _means(sample, E) if centroids_ED is None else centroids_ED)
    return {
        "clusters": [
            {"documents": int(documents_E[k]), "tokens": int(tokens_E[k]), "terms": terms[k], "examples": examples[k]}
            for k in range(E)
        ],
        "balance": float(tokens_E.max() / tokens_E.mean()),
        "silhouette": silhouette(sample.x_SD, sample.clusters_S),
        "nmi": mutual_information(documents_PE) if len(documents_PE) > 1 else None,
        "map": _map(sample),
    }


def mutual_information(counts_PE: Array) -> float:
    """Normalized mutual information from a contingency table, int64 [P, E].

    scikit-learn's `normalized_mutual_info_score` gives the same value, but it needs the labels of all documents.
    """
    entropies = [_entropy(counts_PE.sum(axis=axis)) for axis in (1, 0)]
    shared = mutual_info_score(None, None, contingency=sparse.csr_matrix(counts_PE[:, counts_PE.any(axis=0)]))
    return float(shared / np.mean(entropies)) if shared else 0.0


def top_terms(texts: Sequence[str], clusters_S: Array, count: int) -> list[list[str]]:
    """Typical words of each cluster: those in which its documents differ most from all others.

    A word that a share p of the cluster's documents has, and a share q of the others, gets p ln(p / q): its part of
    the relative entropy. Words that all clusters have alike get nothing, however frequent they are. A single cluster
    has no others: its words have the largest mean tf-idf.
    """
    try:
        counted = vectorizer(max_features=20_000)
        x_ST = counted.fit_transform(texts)
    except ValueError:  # scikit-learn found no words
        return [[] for _ in range(count)]
    names = counted.get_feature_names_out()
    if count == 1:
        best = np.argsort(-np.asarray(x_ST.mean(axis=0)).ravel(), kind="stable")[:_TERMS]
        return [[str(names[t]) for t in best]]
    has_ST = x_ST > 0
    documents_T = np.asarray(has_ST.sum(axis=0)).ravel()
    found: list[list[str]] = []
    for k in range(count):
        rows = np.flatnonzero(clusters_S == k)
        within_T = np.asarray(has_ST[rows].sum(axis=0)).ravel()
        share_T = (within_T + 0.5) / (len(rows) + 1)
        other_T = (documents_T - within_T + 0.5) / (len(texts) - len(rows) + 1)
        score_T = np.where(within_T > 0, share_T * np.log(share_T / other_T), 0.0)
        best = np.argsort(-score_T, kind="stable")[:_TERMS]
        found.append([str(names[t]) for t in best if score_T[t] > 0])
    return found


def nearest_texts(sample: Sample, centroids_ED: Array) -> list[list[str]]:
    """The documents nearest to each cluster's centroid, shortened to their beginnings."""
    found = []
    for k, centroid_D in enumerate(centroids_ED):
        rows = np.flatnonzero(sample.clusters_S == k)
        d_S = squared_distances(sample.x_SD[rows], centroid_D[None])[:, 0]
        best = rows[np.argsort(d_S, kind="stable")[:_EXAMPLES]]
        found.append([" ".join(sample.texts[i][: 4 * _EXCERPT].split())[:_EXCERPT] for i in best])
    return found


def silhouette(x_SD: Array, clusters_S: Array) -> float | None:
    """Mean silhouette of the first 3,000 vectors; None with fewer than 2 clusters, or if no cluster has 2 vectors."""
    x_SD, clusters_S = x_SD[:_SILHOUETTE_SAMPLE], clusters_S[:_SILHOUETTE_SAMPLE]
    if not 2 <= len(np.unique(clusters_S)) < len(clusters_S):
        return None
    return float(silhouette_score(x_SD, clusters_S))


def _entropy(counts: Array) -> float:
    counts, total = counts[counts > 0], counts.sum()
    return float(-np.sum((counts / total) * (np.log(counts) - np.log(total))))


def _means(sample: Sample, count: int) -> Array:
    own_ES = sample.clusters_S == np.arange(count)[:, None]
    means_ED: Array = own_ES @ sample.x_SD.astype(np.float64) / np.maximum(own_ES.sum(axis=1, keepdims=True), 1)
    return means_ED


def _map(sample: Sample) -> dict[str, list[Any]]:
    x_SD = sample.x_SD[:_MAP_POINTS].astype(np.float64)
    axes = min(2, *x_SD.shape)
    flat_S2 = np.zeros((len(x_SD), 2))
    if len(x_SD) > 1:
        flat_S2[:, :axes] = PCA(axes, svd_solver="full").fit_transform(x_SD)
    return {
        "x": np.round(flat_S2[:, 0], 5).tolist(),
        "y": np.round(flat_S2[:, 1], 5).tolist(),
        "cluster": sample.clusters_S[:_MAP_POINTS].tolist(),
        "source": list(sample.sources[:_MAP_POINTS]),
    }
