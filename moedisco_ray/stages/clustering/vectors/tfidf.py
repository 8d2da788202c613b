"""Document vectors from words: tf-idf, reduced by a truncated SVD and scaled to unit length.

This is latent semantic analysis; c-BTM (arXiv 2303.14177) clusters on it.

Shapes: N documents, D dimensions, T terms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.limits import MOST_TERMS, TERM_DIMENSIONS
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, unit_length, write_settings


class TfidfSvd(Vectoriser):
    """Tf-idf of words of two or more characters with sublinear term frequency, reduced by an SVD.

    Args:
        terms: The terms, sorted.
        idf_T: Inverse document frequency of each term.
        components_DT: Right singular vectors.
    """

    kind = "tfidf_svd"

    def __init__(self, terms: Sequence[str], idf_T: Array, components_DT: Array) -> None:
        self._terms, self._idf_T, self._components_DT = list(terms), idf_T, components_DT
        self._vectorizer = vectorizer(vocabulary=self._terms)
        self._vectorizer.idf_ = idf_T

    @classmethod
    def fit(cls, inputs: FitInputs) -> Self:
        """Fit to the texts of the sample."""
        return cls.of_texts(inputs.texts, TERM_DIMENSIONS, inputs.seed)

    @classmethod
    def of_texts(cls, texts: Sequence[str], dimensions: int, seed: int) -> Self:
        """Learn vocabulary and components from a sample.

        Args:
            texts: Texts of the sample.
            dimensions: Number of components; a small sample gives fewer.
            seed: Seed of the randomized SVD.

        Raises:
            CorpusError: The sample has no words.
        """
        # A term in only one document cannot separate clusters, except in a tiny sample.
        counted = vectorizer(max_features=MOST_TERMS, min_df=2 if len(texts) >= 20 else 1)
        try:
            x_NT = counted.fit_transform(texts)
        except ValueError as error:  # scikit-learn raises it if the vocabulary is empty
            remedy = f"found no words to count ({error}); use mean_token"
            raise CorpusError("clusters.vectors", cls.kind, remedy) from error
        room = max(1, min(dimensions, x_NT.shape[0] - 1, x_NT.shape[1] - 1))
        svd = TruncatedSVD(room, random_state=seed).fit(x_NT)
        return cls(counted.get_feature_names_out().tolist(), counted.idf_, svd.components_.astype(np.float32))

    def embed(self, texts: Sequence[str], tokens: Sequence[Array]) -> Array:  # noqa: ARG002 - one signature for all
        """Unit vectors, float32 [N, D]; a text without known words has the zero vector."""
        x_NT = self._vectorizer.transform(texts).astype(np.float32)
        return unit_length(x_NT @ self._components_DT.T)

    def save(self, directory: Path) -> None:
        """Write the vocabulary as JSON, frequencies and components as npz."""
        (directory / "vocabulary.json").write_text(json.dumps(self._terms, ensure_ascii=False) + "\n", encoding="utf-8")
        np.savez(directory / "vectoriser.npz", idf=self._idf_T, components=self._components_DT)
        write_settings(directory, self.kind)

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> Self:  # noqa: ARG003 - one signature for all kinds
        """Load a saved vectoriser."""
        with np.load(directory / "vectoriser.npz", allow_pickle=False) as arrays:
            return cls(read_json(directory / "vocabulary.json"), arrays["idf"], arrays["components"])


def vectorizer(**settings: Any) -> TfidfVectorizer:
    """Make a scikit-learn tf-idf vectorizer with the term weighting that vectors and the cluster report share."""
    return TfidfVectorizer(sublinear_tf=True, **settings)
