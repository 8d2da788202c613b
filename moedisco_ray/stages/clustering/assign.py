"""Assign documents to clusters by their distances (nearest, or balanced under a capacity).

Balanced assignment is the transportation problem

    minimize sum_i w_i d(i, a(i))   subject to   sum_{a(i) = k} w_i <= capacity x mean load   for every cluster k,

where w_i is the number of tokens that document i adds to training. The dual has one price p_k >= 0 per cluster. At the
best prices every document takes argmin_k d(i, k) + p_k, so the prices alone are enough to assign other documents later.
L-BFGS finds the prices on a smoothed dual, in which a soft minimum with a falling temperature replaces the minimum.
Rounding and indivisible documents can leave clusters over the capacity; documents are then moved out, cheapest move
first.

Every function sorts by document id before it sums, so the result does not depend on the order of the documents.

Shapes: N documents, E clusters, C candidates of a repair.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize

from moedisco_ray.stages.clustering.distances import Array

_TEMPERATURES = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Falling temperatures of the soft minimum, as shares of the mean spread of a document's distances to the centroids."""
_PRICING_SAMPLE = 100_000
"""Number of documents that give the prices (offsets that balance the clusters) at every temperature except the last
one."""
_CORRECTION_TEMPERATURE = 0.2
"""Temperature of the soft minimum in `corrected_prices`, as a share of the mean difference between a document's two
smallest costs. Of the values from 0.05 to 0.4, this one needed the fewest corrections (8 and 32 clusters, samples of 3
and 10 %)."""


def assign_balanced(d_NE: Array, weights_N: Array, ids_N: Array, capacity: float | None) -> tuple[Array, Array]:
    """Assign every document to one cluster.

    No cluster holds more than `capacity` times the mean load if moves of single documents can achieve that. Documents
    may be too long for this limit. Then the load of a cluster above the limit exceeds the mean by fewer tokens than its
    shortest document has.

    Args:
        d_NE: Squared distances, or other costs.
        weights_N: Number of tokens that each document adds to training, its copies included.
        ids_N: Distinct ids as fixed-size bytes.
        capacity: Maximum load as a multiple of the mean, at least 1; None assigns the nearest cluster.

    Returns:
        Cluster of each document, int64 [N], and dual price p_k of each cluster, float64 [E] (zeros without a capacity).
    """
    E = d_NE.shape[1]
    if capacity is None or E == 1:
        return d_NE.argmin(axis=1), np.zeros(E)
    order = np.argsort(ids_N, kind="stable")
    d_NE, weights_N = d_NE[order], weights_N[order].astype(np.int64)
    prices_E = balancing_prices(d_NE, weights_N, capacity)
    reduced_NE = d_NE + prices_E
    clusters_N = reduced_NE.argmin(axis=1)
    limit = capacity * weights_N.sum() / E
    _repair(reduced_NE, weights_N, clusters_N, limit)
    out_N = np.empty_like(clusters_N)
    out_N[order] = clusters_N
    return out_N, prices_E


def balancing_prices(d_NE: Array, weights_N: Array, capacity: float) -> Array:
    """Prices under which argmin_k d + p is nearly balanced, float64 [E]; the smallest price is 0.

    Maximizes the dual  sum_i w_i softmin_k(d(i, k) + p_k) - capacity x mean x sum_k p_k  over p >= 0. The temperature
    falls from 0.3 to 0.003 of the mean spread of a document's distances. All but the last temperature use only the
    first 100,000 documents.

    Args:
        d_NE: Squared distances, sorted by id so that the first documents are a uniform sample.
        weights_N: Tokens of each document, not negative.
        capacity: Maximum load as a multiple of the mean, at least 1.
    """
    E = d_NE.shape[1]
    scale = float((d_NE - d_NE.min(axis=1, keepdims=True)).mean(dtype=np.float64))
    prices_E = np.zeros(E)
    total = weights_N.sum()
    if scale <= 0 or not total:
        return prices_E
    for temperature in _TEMPERATURES:
        rows = slice(None) if temperature == _TEMPERATURES[-1] else slice(_PRICING_SAMPLE)
        share_N = weights_N[rows] / max(weights_N[rows].sum(), 1)
        scaled_NE = (d_NE[rows] / (scale * temperature)).astype(np.float64)
        solution = optimize.minimize(
            _negative_dual,
            prices_E / temperature,
            args=(scaled_NE, share_N, capacity / E),
            jac=True,
            method="L-BFGS-B",
            bounds=[(0.0, None)] * E,
            options={"maxiter": 100},
        )
        prices_E = solution.x * temperature
    return (prices_E - prices_E.min()) * scale


def corrected_prices(d_NE: Array, weights_N: Array, capacity: float, prices_E: Array, loads_E: Array) -> Array:
    """Correct prices fitted on a sample, given the loads of all documents; float64 [E], the smallest price is 0.

    The sample's loads differ from the loads of all documents by a sampling error, which hardly changes when prices move
    a little. So the dual of `balancing_prices` is solved again, with this error added to the sample's loads. The
    temperature is high enough that many documents of the sample are near the border between two clusters.

    Args:
        d_NE: Costs of the sample.
        weights_N: Tokens of the sample's documents.
        capacity: Maximum load as a multiple of the mean, at least 1.
        prices_E: Current prices.
        loads_E: Each cluster's share of the tokens of all documents under these prices.
    """
    E = d_NE.shape[1]
    nearest_N2 = np.partition(d_NE + prices_E, 1, axis=1)[:, :2]
    unit = _CORRECTION_TEMPERATURE * float((nearest_N2[:, 1] - nearest_N2[:, 0]).mean())
    share_N = weights_N / max(weights_N.sum(), 1)
    if unit <= 0 or not share_N.any():
        return prices_E
    scaled_NE = (d_NE - d_NE.min(axis=1, keepdims=True)) / unit
    _, shortage_E = _negative_dual(prices_E / unit, scaled_NE, share_N, 0.0)
    solution = optimize.minimize(
        _negative_dual,
        prices_E / unit,
        args=(scaled_NE, share_N, capacity / E, loads_E + shortage_E),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.0, None)] * E,
        options={"maxiter": 100, "ftol": 1e-15},
    )
    return (solution.x - solution.x.min()) * unit


def _negative_dual(
    prices_E: Array, d_NE: Array, share_N: Array, capacity: float, beyond_E: Array | float = 0.0
) -> tuple[float, Array]:
    cost_NE = d_NE + prices_E
    least_N1 = cost_NE.min(axis=1, keepdims=True)
    soft_NE = np.exp(least_N1 - cost_NE)
    total_N1 = soft_NE.sum(axis=1, keepdims=True)
    loads_E = share_N @ (soft_NE / total_N1) + beyond_E
    value = float(share_N @ (least_N1 - np.log(total_N1))[:, 0]) - capacity * float(prices_E.sum())
    value += float((beyond_E * prices_E).sum())
    return -value, capacity - loads_E


def _repair(cost_NE: Array, weights_N: Array, clusters_N: Array, limit: float) -> None:
    """Move documents out of overfull clusters, in place.

    The loop ends, since every move lowers the sum of squared loads.
    """
    E = cost_NE.shape[1]
    loads_E = np.bincount(clusters_N, weights_N, minlength=E)
    problem = cost_NE, weights_N, clusters_N, loads_E, limit
    while _relieve(*problem) or _even_out(*problem):
        pass


def _relieve(cost_NE: Array, weights_N: Array, clusters_N: Array, loads_E: Array, limit: float) -> bool:
    """Move documents, each at most once, from overfull clusters into clusters with room; return whether any moved."""
    candidates_C = np.flatnonzero((loads_E > limit)[clusters_N] & (weights_N > 0))
    if not len(candidates_C):
        return False
    fits_CE = loads_E + weights_N[candidates_C, None] <= limit
    own_C = cost_NE[candidates_C, clusters_N[candidates_C]]
    regret_CE = np.where(fits_CE, cost_NE[candidates_C] - own_C[:, None], np.inf)
    targets_C = regret_CE.argmin(axis=1)
    regret_C = regret_CE.min(axis=1)
    # The regret is the extra cost of a move. Rows are sorted by id and the sort is stable, so equal regrets are ordered
    # by id.
    order = np.argsort(regret_C, kind="stable")
    moved = False
    for c in order[: np.isfinite(regret_C).sum()]:
        i, target = candidates_C[c], targets_C[c]
        source, weight = clusters_N[i], weights_N[i]
        if loads_E[source] > limit and loads_E[target] + weight <= limit:
            clusters_N[i] = target
            loads_E[source] -= weight
            loads_E[target] += weight
            moved = True
    return moved


def _even_out(cost_NE: Array, weights_N: Array, clusters_N: Array, loads_E: Array, limit: float) -> bool:
    """Move one document from an overfull to the emptiest cluster if that evens out loads; return whether it did."""
    target = int(loads_E.argmin())
    for source in np.argsort(-loads_E, kind="stable"):
        if loads_E[source] <= limit:
            return False
        inside = np.flatnonzero((clusters_N == source) & (weights_N > 0))
        helpful = inside[loads_E[target] + weights_N[inside] < loads_E[source]]
        if len(helpful):
            i = helpful[(cost_NE[helpful, target] - cost_NE[helpful, source]).argmin()]
            clusters_N[i] = target
            loads_E[source] -= weights_N[i]
            loads_E[target] += weights_N[i]
            return True
    return False
