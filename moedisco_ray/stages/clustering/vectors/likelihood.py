"""Costs by likelihood: how badly each cluster's own language model predicts a document (SMALLTALK, arXiv 2410.03529).

Models and clusters are found together, by expectation and maximisation with hard, balanced assignments: count each
cluster's documents, then assign every document to where it is likeliest. Here the language models are bigrams
(`language`), counted and assigned on the sample; every other document is then assigned by what they say of it.

Shapes: N documents, S documents of the sample, E clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from moedisco_ray.stages.clustering.assign import assign_balanced
from moedisco_ray.stages.clustering.grid import Array
from moedisco_ray.stages.clustering.kmeans import ITERATIONS
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, write_settings
from moedisco_ray.stages.clustering.vectors.language import LanguageModels, Text

READ = 256
"""Tokens of a document's beginning: SMALLTALK's router sees as many."""


class Likelihood(Vectoriser):
    """Nats per token of a document's beginning, under each cluster's language model.

    Args:
        models: Of all clusters.
    """

    kind = "likelihood"

    def __init__(self, models: LanguageModels) -> None:
        self._models = models

    @classmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """By expectation and maximisation on the sample, from several random starts: the one with the least cost.

        A start ends when nothing moves, or after `kmeans.ITERATIONS` steps.
        """
        # One id more than the sample has, for every token that it lacks.
        vocabulary = 2 + max((int(document.max(initial=0)) for document in inputs.tokens), default=0)
        text = Text.of(inputs.tokens, vocabulary, READ)
        starts = [_climb(text, inputs, vocabulary, restart) for restart in range(inputs.settings.restarts)]
        clusters_S, _ = min(starts, key=lambda start: start[1])
        return cls(LanguageModels.count(text, clusters_S, inputs.settings.count, vocabulary))

    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:  # noqa: ARG002 - one signature for all kinds
        """Costs, float32 [N, E]."""
        return self._models.costs(Text.of(tokens, self._models.vocabulary, READ)).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Write the counts."""
        np.savez_compressed(
            directory / "vectoriser.npz", token=self._models.token_EV, before=self._models.before_EV, pair=self._models.pair_EH)
        write_settings(directory, self.kind)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:  # noqa: ARG003 - one signature for all kinds
        """Read what `save` wrote."""
        with np.load(directory / "vectoriser.npz", allow_pickle=False) as arrays:
            return cls(LanguageModels(arrays["token"], arrays["before"], arrays["pair"]))


def _climb(text: Text, inputs: FitInputs, vocabulary: int, restart: int) -> tuple[Array, float]:
    """Clusters of the sample from one random start, int64 [S], and their cost in nats."""
    settings = inputs.settings
    random = np.random.Generator(np.random.Philox(key=[inputs.seed, restart]))
    cost_SE = random.uniform(size=(len(inputs.tokens), settings.count))
    clusters_S = np.full(len(cost_SE), -1)
    for _ in range(ITERATIONS):
        assigned_S, _ = assign_balanced(cost_SE, inputs.weights_S, inputs.ids_S, settings.capacity)
        if np.array_equal(assigned_S, clusters_S):
            break
        clusters_S = assigned_S
        cost_SE = LanguageModels.count(text, clusters_S, settings.count, vocabulary).costs(text, clusters_S)
    return clusters_S, float(inputs.weights_S @ cost_SE[np.arange(len(cost_SE)), clusters_S])
