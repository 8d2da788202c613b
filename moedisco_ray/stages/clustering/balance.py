"""Fit prices that balance the clusters on a sample of documents, then correct them with the loads of all documents.

A *price* is added to the costs of all documents in a cluster, so that fewer choose it. A *load* is the number of tokens
in a cluster. The driver holds the costs of the sample only; about the other documents it learns only the load of each
cluster. Each correction needs the loads of all documents under the new prices, which take one pass over their vectors.

Shapes: N documents, D dimensions, E clusters, M documents that were moved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moedisco_ray.stages.clustering.assign import assign_balanced, balancing_prices, corrected_prices
from moedisco_ray.stages.clustering.distances import Array, cluster_costs
from moedisco_ray.stages.clustering.vectors import adjust

TOLERANCE = 0.005
"""Excess of the largest cluster over the capacity, as a share of the capacity, below which the corrections end."""
_CORRECTIONS = 5
"""Maximum number of corrections; two are usual."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A rule that assigns a document to the cluster with the least sum of cost and price, with a list of exceptions.

    Attributes:
        centre_D: Centre that is subtracted from document vectors; None if nothing is subtracted.
        centroids_ED: Centroids; None if the vector of a document already holds its cost in each cluster.
        prices_E: Prices of the clusters.
        moved_M: Sorted ids of the exceptions: documents that are in another cluster so that none exceeds the capacity.
        moved_to_M: Clusters of the exceptions.
    """

    centre_D: Array | None
    centroids_ED: Array | None
    prices_E: Array
    moved_M: Array
    moved_to_M: Array

    def clusters(self, ids_N: Array, x_ND: Array) -> Array:
        """Cluster of each document, int64 [N], given ids and uncentred vectors."""
        clusters_N = (document_costs(x_ND, self.centre_D, self.centroids_ED) + self.prices_E).argmin(axis=1)
        if len(self.moved_M):
            places_N = np.minimum(np.searchsorted(self.moved_M, ids_N), len(self.moved_M) - 1)
            moved_N = self.moved_M[places_N] == ids_N
            clusters_N[moved_N] = self.moved_to_M[places_N[moved_N]]
        return clusters_N


class Costs(NamedTuple):
    """Ids and tokens of documents in order of id, and each document's cost in each cluster (float32 [N, E])."""

    ids_N: Array
    weights_N: Array
    cost_NE: Array


class Loads(NamedTuple):
    """Numbers of documents and of tokens in each cluster, int64 [E] each."""

    documents_E: Array
    tokens_E: Array


def document_costs(x_ND: Array, centre_D: Array | None, centroids_ED: Array | None) -> Array:
    """Cost of each document in each cluster, float32 [N, E], from uncentred vectors."""
    return cluster_costs(adjust(x_ND, centre_D), centroids_ED).astype(np.float32)


def fit_assignment(
    sample: Costs,
    loads_of: Callable[[Assignment], Loads],
    centre_D: Array | None,
    centroids_ED: Array | None,
    *,
    documents: int,
    capacity: float | None,
) -> tuple[Assignment, Loads]:
    """Fit the rule by which a document takes the cluster with the smallest sum of its cost and a price.

    If the sample holds all documents, the clusters are those of `assign_balanced`. Otherwise the clusters' prices are
    corrected until the largest cluster exceeds the capacity by at most `TOLERANCE`. Very long or nearly equal documents
    can prevent that; the best prices found are used then.

    Args:
        sample: Costs of the sample, which is the first documents in order of their ids.
        loads_of: Function that returns the loads of all documents under a rule.
        centre_D: Centre that is subtracted from document vectors; None if nothing is subtracted.
        centroids_ED: Centroids; None if the vector of a document already holds its cost in each cluster.
        documents: Number of all documents.
        capacity: Maximum load as a multiple of the mean; None assigns the nearest cluster.

    Returns:
        The rule, and the loads of all documents under it.
    """
    ids_N, weights_N, cost_NE = sample
    E = cost_NE.shape[1]
    nearest = Assignment(centre_D, centroids_ED, np.zeros(E), ids_N[:0], np.empty(0, dtype=np.int64))
    if capacity is None or E == 1:
        return nearest, loads_of(nearest)
    if len(ids_N) == documents:
        clusters_N, prices_E = assign_balanced(cost_NE, weights_N, ids_N, capacity)
        moved_N = clusters_N != (cost_NE + prices_E).argmin(axis=1)
        exact = dataclasses.replace(nearest, prices_E=prices_E, moved_M=ids_N[moved_N], moved_to_M=clusters_N[moved_N])
        return exact, loads_of(exact)
    prices_E = balancing_prices(cost_NE, weights_N, capacity)
    found: list[tuple[float, Assignment, Loads]] = []
    for _ in range(_CORRECTIONS + 1):
        rule = dataclasses.replace(nearest, prices_E=prices_E)
        loads = loads_of(rule)
        shares_E = loads.tokens_E / max(int(loads.tokens_E.sum()), 1)
        excess = float(shares_E.max()) * E / capacity - 1
        found.append((excess, rule, loads))
        if excess <= TOLERANCE:
            break
        before_E, prices_E = prices_E, corrected_prices(cost_NE, weights_N, capacity, prices_E, shares_E)
        if np.array_equal(before_E, prices_E):
            break
    _, rule, loads = min(found, key=lambda attempt: attempt[0])
    return rule, loads
