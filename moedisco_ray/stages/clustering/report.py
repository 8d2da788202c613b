"""What a person wants to know of the clusters: sizes, cohesion, words, examples, agreement with named sources, a map.

Shapes: S documents of the sample, D dimensions, T terms, E clusters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from moedisco_ray.stages.clustering.blocks import squared_distances
from moedisco_ray.stages.clustering.grid import Array
from moedisco_ray.stages.clustering.vectors.tfidf import vectorizer

_SILHOUETTE_SAMPLE = 3_000  # the silhouette takes time and memory that grow with the square
_MAP_POINTS = 2_000
_EXCERPT = 200


@dataclasses.dataclass(frozen=True)
class Sample:
    """Documents of the sample with everything the report shows of them.

    Attributes:
        texts: S texts.
        sources: Their sources' names.
        x_SD: Their vectors.
        clusters_S: Their clusters, after balancing.
    """

    texts: Sequence[str]
    sources: Sequence[str]
    x_SD: Array
    clusters_S: Array


def cluster_report(
    sample: Sample, centroids_ED: Array | None, count: int, clusters_N: Array, weights_N: Array, sources_N: Array,
) -> dict[str, Any]:
    """Everything that `clusters/report.json` holds, but for how the k-means went.

    Args:
        sample: For words, examples, silhouette and map.
        centroids_ED: The centroids; None: the means of the sample's vectors in each cluster.
        count: Clusters, E.
        clusters_N: Cluster of every document.
        weights_N: Training tokens of every document.
        sources_N: Integer code of every document's source.

    Returns:
        `clusters` (one entry each: `documents`, `tokens`, `terms`, `examples`), `balance` (tokens of the largest
        cluster over the mean), `silhouette` (in [-1, 1], of a part of the sample; None where it is not defined),
        `nmi` (normalised mutual information of cluster and source, arithmetic mean; None with one source), `map`
        (`x`, `y`, `cluster`, `source`).
    """
    E = count
    documents_E = np.bincount(clusters_N, minlength=E)
    tokens_E = np.array([weights_N[clusters_N == k].sum() for k in range(E)])
    terms = top_terms(sample.texts, sample.clusters_S, E)
    examples = nearest_texts(sample, _means(sample, E) if centroids_ED is None else centroids_ED)
    return {
        "clusters": [
            {"documents": int(documents_E[k]), "tokens": int(tokens_E[k]), "terms": terms[k], "examples": examples[k]}
            for k in range(E)],
        "balance": float(tokens_E.max() / tokens_E.mean()),
        "silhouette": silhouette(sample.x_SD, sample.clusters_S),
        "nmi": float(normalized_mutual_info_score(sources_N, clusters_N)) if len(np.unique(sources_N)) > 1 else None,
        "map": _map(sample),
    }


def top_terms(texts: Sequence[str], clusters_S: Array, count: int, terms: int = 10) -> list[list[str]]:
    """Per cluster the words whose mean tf-idf exceeds that of all documents the most."""
    try:
        counted = vectorizer(max_features=20_000)
        x_ST = counted.fit_transform(texts)
    except ValueError:  # scikit-learn's word for: there are no words
        return [[] for _ in range(count)]
    names = counted.get_feature_names_out()
    overall_T = np.asarray(x_ST.mean(axis=0)).ravel()
    found: list[list[str]] = []
    for k in range(count):
        rows = np.flatnonzero(clusters_S == k)
        excess_T = np.asarray(x_ST[rows].mean(axis=0)).ravel() - overall_T if len(rows) else np.zeros(len(names))
        best = np.argsort(-excess_T, kind="stable")[:terms]
        found.append([str(names[t]) for t in best if excess_T[t] > 0 or (count == 1 and len(rows))])
    return found


def nearest_texts(sample: Sample, centroids_ED: Array, examples: int = 3) -> list[list[str]]:
    """Per cluster the beginnings of the documents nearest to its centroid."""
    found = []
    for k, centroid_D in enumerate(centroids_ED):
        rows = np.flatnonzero(sample.clusters_S == k)
        d_S = squared_distances(sample.x_SD[rows], centroid_D[None])[:, 0]
        best = rows[np.argsort(d_S, kind="stable")[:examples]]
        found.append([" ".join(sample.texts[i][: 4 * _EXCERPT].split())[:_EXCERPT] for i in best])
    return found


def silhouette(x_SD: Array, clusters_S: Array) -> float | None:
    """Mean silhouette of the first 3,000 vectors; None unless there are at least 2 clusters, one with 2 vectors."""
    x_SD, clusters_S = x_SD[:_SILHOUETTE_SAMPLE], clusters_S[:_SILHOUETTE_SAMPLE]
    if not 2 <= len(np.unique(clusters_S)) < len(clusters_S):
        return None
    return float(silhouette_score(x_SD, clusters_S))


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
        "x": np.round(flat_S2[:, 0], 5).tolist(), "y": np.round(flat_S2[:, 1], 5).tolist(),
        "cluster": sample.clusters_S[:_MAP_POINTS].tolist(), "source": list(sample.sources[:_MAP_POINTS]),
    }
