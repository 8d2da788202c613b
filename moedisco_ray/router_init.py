"""Router rows from data: one direction per cluster, from sums that blocks and workers can add up.

A router has no bias, so its logits are x_TD w_CD^T. Every solution is shifted so that the directions sum to zero, which
changes no softmax, and scaled so that the root mean square of its logits over the calibration data is 1: with random or
learnt rows alike, the softmax starts soft enough for its gradient to pass.

Shapes: T tokens, D hidden, C clusters. Everything inside is float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

DataMethod = Literal["ridge", "centroid", "random"]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of router inputs x and the clusters of their tokens; add them up with `+`.

    Attributes:
        xx_DD: Sum of x x^T.
        xy_DC: Sum of x over each cluster's tokens: X^T Y for one-hot labels Y.
        unit_DC: Sum of x / |x| over each cluster's tokens.
        count_C: Tokens per cluster.
    """

    xx_DD: Tensor
    xy_DC: Tensor
    unit_DC: Tensor
    count_C: Tensor

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(self.xx_DD + other.xx_DD, self.xy_DC + other.xy_DC,
                          self.unit_DC + other.unit_DC, self.count_C + other.count_C)


def statistics(x_TD: Tensor, cluster_T: Tensor, clusters: int) -> Statistics:
    """The statistics of one block of tokens.

    Args:
        x_TD: Router inputs.
        cluster_T: The cluster of each token's document.
        clusters: C.
    """
    x_TD = x_TD.double()
    y_TC = torch.nn.functional.one_hot(cluster_T, clusters).double()
    unit_TD = torch.nn.functional.normalize(x_TD, dim=1)
    return Statistics(x_TD.T @ x_TD, x_TD.T @ y_TC, unit_TD.T @ y_TC, y_TC.sum(0))


def ridge_directions(total: Statistics, strength: float = 1e-3) -> Tensor:
    """Directions w_CD that regress the one-hot cluster label on the router's input, in closed form.

    W = (X^T X + lambda I)^-1 X^T Y, with lambda = strength x the mean of X^T X's diagonal: the least-squares estimate
    of the probability of each cluster. So the share of tokens a cluster draws follows its share of the data. A
    training-free router by ridge regression is DUME's.

    Args:
        total: Statistics of all calibration data.
        strength: Relative ridge.

    Returns:
        w_CD, normalised.
    """
    lam = strength * total.xx_DD.diagonal().mean()
    return normalised(ridge_solution(total, float(lam)).T, total)


def ridge_solution(total: Statistics, lam: float) -> Tensor:
    """The plain ridge solution (X^T X + lam I)^-1 X^T Y without intercept, w_DC."""
    regularised = total.xx_DD + lam * torch.eye(len(total.xx_DD), dtype=torch.float64)
    return torch.linalg.solve(regularised, total.xy_DC)


def centroid_directions(total: Statistics) -> Tensor:
    """Spherical centroids: the unit vector along the mean of each cluster's unit inputs; w_CD, normalised."""
    return normalised(torch.nn.functional.normalize(total.unit_DC.T, dim=1), total)


def random_directions(total: Statistics, seed: int) -> Tensor:
    """Directions that know nothing of the clusters, the baseline; w_CD, normalised."""
    generator = torch.Generator().manual_seed(seed)
    w_CD = torch.randn(total.xy_DC.T.shape, generator=generator, dtype=torch.float64)
    return normalised(w_CD, total)


def directions(method: DataMethod, total: Statistics, seed: int) -> Tensor:
    """Directions w_CD by one of the methods; `seed` serves `random` alone."""
    solvers: dict[DataMethod, Callable[[], Tensor]] = {
        "ridge": lambda: ridge_directions(total),
        "centroid": lambda: centroid_directions(total),
        "random": lambda: random_directions(total, seed),
    }
    return solvers[method]()


def normalised(w_CD: Tensor, total: Statistics) -> Tensor:
    """Directions shifted to sum zero and scaled to logits of root mean square 1 over the data.

    The mean square is tr(W X^T X W^T) / (T C). A single cluster has nothing to choose: its direction is zero.
    """
    w_CD = w_CD - w_CD.mean(dim=0)
    tokens = float(total.count_C.sum())
    mean_square = torch.einsum("cd,de,ce->", w_CD, total.xx_DD, w_CD) / max(tokens * len(w_CD), 1.0)
    if float(mean_square) <= 0:
        return torch.zeros_like(w_CD)
    return w_CD / mean_square.sqrt()
