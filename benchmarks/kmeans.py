"""K-means to the same inertia on the same vectors, whole process against whole process, one core each:

ours          the product's seeding and Lloyd steps from per-block statistics, as its Ray Data path runs them
lloyd         scikit-learn's KMeans
minibatch     scikit-learn's MiniBatchKMeans

Every arm makes the same number of restarts and keeps the best; each round has a seed of its own. An arm's time counts
only if its median inertia is within 0.5 % of the best arm's; what it reached is in the result either way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans

from benchmarks.harness import by_arm, environment, interleave, ratios, spread, write_result
from moedisco_ray.stages.clustering.blocks import squared_distances
from moedisco_ray.stages.clustering.kmeans import fit_kmeans

SETTINGS = {"50k x 64, K 16": (50_000, 64, 16), "20k x 256, K 8": (20_000, 256, 8)}
RESTARTS, ITERATIONS, SAMPLE, BLOCK = 4, 100, 10_000, 8192
TOLERANCE = 0.005


def vectors(n: int, d: int, k: int) -> NDArray[np.float32]:
    """Overlapping clusters of unequal size and width, so that Lloyd has something to do."""
    generator = np.random.default_rng(0)
    centres_KD = generator.normal(size=(k, d)) * 1.2
    label_N = generator.choice(k, size=n, p=generator.dirichlet(np.full(k, 3.0)))
    width_K = generator.uniform(0.6, 1.4, size=k)
    return (centres_KD[label_N] + generator.normal(size=(n, d)) * width_K[label_N, None]).astype(np.float32)


def fit(arm: str, x_ND: NDArray[np.float32], k: int, seed: int) -> NDArray[np.floating]:
    if arm == "ours":
        return fit_kmeans(x_ND, x_ND[:SAMPLE], k, restarts=RESTARTS, iterations=ITERATIONS, seed=seed).centroids_KD
    if arm == "lloyd":
        return KMeans(k, n_init=RESTARTS, max_iter=ITERATIONS, random_state=seed).fit(x_ND).cluster_centers_
    return (
        MiniBatchKMeans(k, n_init=RESTARTS, max_iter=ITERATIONS, batch_size=4096, random_state=seed)
        .fit(x_ND)
        .cluster_centers_
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["ours", "lloyd", "minibatch"])
    parser.add_argument("--setting", choices=list(SETTINGS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.arm:
        n, d, k = SETTINGS[arguments.setting]
        x_ND = vectors(n, d, k)
        started = time.perf_counter()
        centroids_KD = fit(arguments.arm, x_ND, k, arguments.seed)
        seconds = time.perf_counter() - started
        inertia = sum(
            float(squared_distances(x_ND[i : i + BLOCK], centroids_KD).min(axis=1).sum()) for i in range(0, n, BLOCK)
        )
        print(json.dumps({"seconds": seconds, "inertia": inertia}))
        return
    cells = {}
    for setting in SETTINGS:
        rounds = interleave(
            __spec__.name, ["ours", "lloyd", "minibatch"], arguments.rounds, "--setting", setting, seeded=True
        )
        seconds = by_arm(rounds, "seconds")
        inertia = {arm: statistics.median(values) for arm, values in by_arm(rounds, "inertia").items()}
        best = min(inertia.values())
        cells[setting] = {
            "seconds": {arm: spread(values) for arm, values in seconds.items()},
            "inertia_over_best": {arm: value / best for arm, value in inertia.items()},
            "at_equal_inertia": {arm: value <= best * (1 + TOLERANCE) for arm, value in inertia.items()},
            "ours_over_lloyd": ratios(seconds["ours"], seconds["lloyd"]),
            "ours_over_minibatch": ratios(seconds["ours"], seconds["minibatch"]),
        }
    write_result(
        "kmeans",
        {
            **environment("python -m benchmarks.kmeans"),
            "setting": {
                "restarts": RESTARTS,
                "iterations": ITERATIONS,
                "threads": 1,
                "rounds": arguments.rounds,
                "seeds": f"0 to {arguments.rounds - 1}",
                "inertia_tolerance": TOLERANCE,
            },
            "cells": cells,
        },
    )


if __name__ == "__main__":
    main()
