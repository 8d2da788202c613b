"""Compute router rows from data: one direction per cluster, from sums of router inputs over blocks and workers.

A router has no bias, so its logits are x_TD w_CD^T. Every solution is shifted so that the directions sum to zero, which
changes no softmax, and scaled so that the root mean square of its logits over the calibration data is 1. At this scale
the softmax is not saturated, so gradients reach the router in the fine-tune, whichever method gave the directions.

A direction v_D with v . x close to 1 for all inputs x replaces the bias; it is the least-squares solution of X v = 1.
Adding b_c v to row c adds b_c (v . x) to its logit, so that offsets b_C can give every cluster its share of the tokens.

Shapes: T tokens, D hidden, C clusters. Everything inside is float64, on the device of the router's inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moedisco_ray.core.registry import ROUTER_METHODS, load

_TINY = 1e-30
_SWEEPS = 100
"""Maximum number of sweeps over the offsets: if many logits are equal, no offsets give the target loads."""
_SLOPE = 1 / 8
"""Scale s of a router's first layer: with logits of root mean square 1, tanh is off by 0.5 % there."""
_STRENGTHS = torch.logspace(-2, 2, 5, dtype=torch.float64)
"""Ridge strengths to try, as multiples of the mean eigenvalue. Weaker ridges give huge rows along directions in which
inputs hardly differ. The fine-tune moves those inputs quickly, and the rows cannot follow. GCV would choose such a
ridge, because it takes tokens as independent although a document's tokens share one label."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of router inputs x and their tokens' clusters; `+` adds the statistics of other tokens.

    Attributes:
        xx_DD: Sum of x x^T.
        xy_DC: Sum of x over each cluster's tokens: X^T Y for one-hot labels Y.
        count_C: Tokens per cluster.
    """

    xx_DD: Tensor
    xy_DC: Tensor
    count_C: Tensor

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.xx_DD + other.xx_DD, self.xy_DC + other.xy_DC, self.count_C + other.count_C)


def statistics(x_TD: Tensor, cluster_T: Tensor, clusters: int) -> Statistics:
    """The statistics of one block of router inputs x_TD, with the cluster of each token's document."""
    x_TD = x_TD.double()
    y_TC = torch.nn.functional.one_hot(cluster_T, clusters).double()
    return Statistics(x_TD.T @ x_TD, x_TD.T @ y_TC, y_TC.sum(0))


def ridge_directions(total: Statistics, _seed: int = 0) -> Tensor:
    """Directions w_CD by ridge regression of the one-hot cluster label on the router's input, as in DUME.

    W = (X^T X + lambda I)^-1 X^T Y, a least-squares estimate of each cluster's probability. Generalised
    cross-validation chooses lambda; see `ridge_strength`.

    Returns:
        w_CD, normalised.
    """
    return normalised(ridge_solution(total, ridge_strength(total)).T, total)


def principal_directions(total: Statistics, clusters: int) -> Tensor:
    """Directions w_CD that divide the inputs themselves, without labels, along their principal components.

    The directions are the corners of a regular simplex in the first C - 1 components, each scaled to variance 1. So two
    clusters are the two sides of the first component. The inputs' mean has the same logit for all clusters.

    Returns:
        w_CD, normalised.
    """
    tokens = total.count_C.sum()
    mean_D = total.xy_DC.sum(1) / tokens
    value_D, vector_DD = torch.linalg.eigh(total.xx_DD / tokens - torch.outer(mean_D, mean_D))
    used = min(clusters - 1, len(value_D))
    scaled_DU = (
        vector_DD[:, -used:].flip(1) / value_D[-used:].flip(0).clamp(min=_TINY).sqrt() if used else vector_DD[:, :0]
    )
    corner_CC = torch.eye(clusters, dtype=torch.float64, device=mean_D.device) - 1 / clusters
    w_CD = (
        torch.linalg.eigh(corner_CC).eigenvectors[:, -used:] @ scaled_DU.T if used else torch.zeros_like(total.xy_DC.T)
    )
    return normalised(w_CD - torch.outer(w_CD @ mean_D, constant_direction(total)), total)


def ridge_solution(total: Statistics, lam: float) -> Tensor:
    """The ridge solution w_DC = (X^T X + lam I)^-1 X^T Y, without an intercept."""
    regularised = total.xx_DD + lam * torch.eye(len(total.xx_DD), dtype=torch.float64, device=total.xx_DD.device)
    return torch.linalg.solve(regularised, total.xy_DC)


def ridge_strength(total: Statistics) -> float:
    """The lambda with the least generalised cross-validation (GCV) error.

    Candidates are powers of ten times the mean eigenvalue of X^T X.

    GCV(lambda) = T |Y - X W|^2 / (T - tr H)^2 with H = X (X^T X + lambda I)^-1 X^T: leave-one-out error with every
    leverage at its mean (Golub, Heath and Wahba 1979). It needs only the sums in `Statistics`, since |Y|^2 = T,
    and is evaluated in the eigenbasis of X^T X.
    """
    eigen_D, basis_DD = torch.linalg.eigh(total.xx_DD)
    eigen_D = eigen_D.clamp(min=0.0)
    squares_D = (basis_DD.T @ total.xy_DC).square().sum(1)
    tokens = total.count_C.sum()
    lam_S = _STRENGTHS.to(eigen_D.device) * eigen_D.mean()
    filter_SD = 1.0 / (eigen_D + lam_S[:, None])
    residual_S = tokens - 2 * filter_SD @ squares_D + filter_SD.square() @ (eigen_D * squares_D)
    free_S = tokens - filter_SD @ eigen_D
    return float(lam_S[(residual_S / free_S.square()).argmin()])


def constant_direction(total: Statistics) -> Tensor:
    """v_D with v . x as close to 1 as possible for all inputs x: ridge regression of the constant 1."""
    return ridge_solution(total, float(_STRENGTHS[0] * total.xx_DD.diagonal().mean())).sum(1)


def load_offsets(logits_TC: Tensor, share_C: Tensor) -> Tensor:
    """Offsets b_C such that cluster c has the largest of logits_TC + b_C for a share `share_C`[c] of the tokens.

    They minimise the convex function sum_t max_c (logits_tc + b_c) - T sum_c share_c b_c, whose gradient is load minus
    target load. A sweep sets each offset in turn to its minimiser, the value at which share_c T tokens prefer c (a
    quantile). Sweeps end when every load is within one token of its target, or after `_SWEEPS` sweeps.

    Args:
        logits_TC: Logits of the calibration data.
        share_C: Target shares; non-negative, and they sum to 1.

    Returns:
        b_C, which sums to 0.
    """
    tokens, clusters = logits_TC.shape
    wanted_C = (share_C * tokens).round().long().clamp(0, tokens)
    wanted = wanted_C.tolist()
    offset_C = torch.zeros(clusters, dtype=torch.float64, device=logits_TC.device)
    for _ in range(_SWEEPS if clusters > 1 else 0):
        load_C = torch.bincount((logits_TC + offset_C).argmax(1), minlength=clusters)
        if int((load_C - wanted_C).abs().max()) <= 1:
            break
        for c in range(clusters):
            others_TC = logits_TC + offset_C
            others_TC[:, c] = -torch.inf
            need_T = (others_TC.amax(1) - logits_TC[:, c]).sort().values
            edges = torch.cat([need_T[:1] - 1, need_T, need_T[-1:] + 1])
            offset_C[c] = edges[wanted[c] : wanted[c] + 2].mean()
    return offset_C - offset_C.mean()


def random_directions(total: Statistics, seed: int) -> Tensor:
    """Random directions, as a baseline; w_CD, normalised."""
    generator = torch.Generator().manual_seed(seed)
    w_CD = torch.randn(total.xy_DC.T.shape, generator=generator, dtype=torch.float64).to(total.xy_DC.device)
    return normalised(w_CD, total)


def no_directions(total: Statistics, _seed: int = 0) -> Tensor:
    """Zeros, w_CD: rows stay as they are."""
    return torch.zeros_like(total.xy_DC.T)


def directions(method: str, total: Statistics, seed: int) -> Tensor:
    """Direction of each cluster, w_CD, by a method of `merge.router`, or by `principal`, which uses no labels."""
    if method == "principal":
        return principal_directions(total, len(total.count_C))
    compute: Callable[[Statistics, int], Tensor] = load(ROUTER_METHODS[method])
    return compute(total, seed)


def normalised(w_CD: Tensor, total: Statistics) -> Tensor:
    """Directions shifted to sum zero and scaled to logits of root mean square 1 over the data.

    The mean square is tr(W X^T X W^T) / (T C). A single cluster has no choice: its direction is zero.
    """
    w_CD = w_CD - w_CD.mean(dim=0)
    tokens = float(total.count_C.sum())
    mean_square = torch.einsum("cd,de,ce->", w_CD, total.xx_DD, w_CD) / max(tokens * len(w_CD), 1.0)
    if float(mean_square) <= 0:
        return torch.zeros_like(w_CD)
    return w_CD / mean_square.sqrt()


def two_layers(rows_ED: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """The two layers of a router with a tanh between them that selects experts as rows do.

    Each row r has a hidden unit of its own, and the logit is tanh(s r . x) / s, which increases with r . x. With a
    small s, it is close to r . x as long as that is below 1 / s.

    Args:
        rows_ED: Rows of a router of one layer.
        units: Hidden units, H; at least E. Those without a row are zero.

    Returns:
        The layers' weights, [H, D] and [E, H].
    """
    first_HD = torch.zeros(units, rows_ED.shape[1], dtype=rows_ED.dtype)
    first_HD[: len(rows_ED)] = rows_ED * _SLOPE
    return first_HD, torch.eye(len(rows_ED), units, dtype=rows_ED.dtype) / _SLOPE
