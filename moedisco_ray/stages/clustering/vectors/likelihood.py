"""Costs by likelihood: a document's cross-entropy under each cluster's own language model (SMALLTALK, arXiv 2410.03529).

Expectation maximization with hard, balanced assignments finds models and clusters together: count the documents of each cluster,
then assign every document to the cluster whose model gives it the highest likelihood, and repeat. The language models are bigrams
(see `language`). They are fitted on the sample; their costs then assign all other documents.

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
"""Tokens read from a document's beginning, the same number as in SMALLTALK's router."""


class Likelihood(Vectoriser):
    """Nats per token of a document's beginning under each cluster's language model."""

    kind = "likelihood"

    def __init__(self, models: LanguageModels) -> None:
        self._models = models

    @classmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Fit models by expectation maximization on the sample, and keep the random start with the least cost.

        A start ends when no document changes its cluster, or after `kmeans.ITERATIONS` steps.
        """
        # One more id than the sample has: it stands for all tokens that the sample lacks.
        vocabulary = 2 + max((int(document.max(initial=0)) for document in inputs.tokens), default=0)
        text = Text.of(inputs.tokens, vocabulary, READ)
        starts = [_fit_once(text, inputs, vocabulary, restart) for restart in range(inputs.settings.restarts)]
        clusters_S, _ = min(starts, key=lambda start: start[1])
        return cls(LanguageModels.count(text, clusters_S, inputs.settings.number, vocabulary))

    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:  # noqa: ARG002 - one signature for all kinds
        """Costs of documents in each cluster, float32 [N, E]."""
        return self._models.costs(Text.of(tokens, self._models.vocabulary, READ)).astype(np.float32)

    def save(self, directory: Path) -> None:
        """Write the counts of the language models."""
        np.savez_compressed(
            directory / "vectoriser.npz", token=self._models.token_EV, before=self._models.before_EV, pair=self._models.pair_EH)
        write_settings(directory, self.kind)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:  # noqa: ARG003 - one signature for all kinds
        """Load a saved vectoriser."""
        with np.load(directory / "vectoriser.npz", allow_pickle=False) as arrays:
            return cls(LanguageModels(arrays["token"], arrays["before"], arrays["pair"]))


def _fit_once(text: Text, inputs: FitInputs, vocabulary: int, restart: int) -> tuple[Array, float]:
    """Fit models and clusters from one random start; return the sample's clusters, int64 [S], and their total cost in nats."""
    settings = inputs.settings
    random = np.random.Generator(np.random.Philox(key=[inputs.seed, restart]))
    cost_SE = random.uniform(size=(len(inputs.tokens), settings.number))
    clusters_S = np.full(len(cost_SE), -1)
    for _ in range(ITERATIONS):
        assigned_S, _ = assign_balanced(cost_SE, inputs.weights_S, inputs.ids_S, settings.capacity)
        if np.array_equal(assigned_S, clusters_S):
            break
        clusters_S = assigned_S
        cost_SE = LanguageModels.count(text, clusters_S, settings.number, vocabulary).costs(text, clusters_S)
    return clusters_S, float(inputs.weights_S @ cost_SE[np.arange(len(cost_SE)), clusters_S])
