"""Document vectors, each kind a small class behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moedisco_ray.clustering.vectors.base import Vectoriser, adjust, read_settings
from moedisco_ray.clustering.vectors.hidden_state import HiddenState
from moedisco_ray.clustering.vectors.mean_token import MeanToken
from moedisco_ray.clustering.vectors.tfidf import TfidfSvd
from moedisco_ray.config import Clusters
from moedisco_ray.errors import CheckpointError

__all__ = ["HiddenState", "MeanToken", "TfidfSvd", "Vectoriser", "adjust", "load_vectoriser", "new_vectoriser"]


def new_vectoriser(
    settings: Clusters, sample_texts: Sequence[str], model_dir: Path, max_tokens: int, seed: int,
) -> Vectoriser:
    """The vectoriser that `clusters.vectors` names, fitted on the texts of a sample as far as it needs them.

    Args:
        settings: The configuration's section.
        sample_texts: In an order that depends on nothing but the documents.
        model_dir: The seed model.
        max_tokens: What `hidden_state` reads of a document.
        seed: Of the SVD.
    """
    if settings.vectors == "tfidf_svd":
        return TfidfSvd.fit(sample_texts, settings.dimensions, seed)
    if settings.vectors == "mean_token":
        return MeanToken.of_model(model_dir)
    return HiddenState(model_dir, max_tokens)


def load_vectoriser(directory: Path, device: str = "cpu") -> Vectoriser:
    """Read what `Vectoriser.save` wrote.

    Args:
        directory: Where it lies.
        device: Where a vectoriser with a model runs it.

    Raises:
        CheckpointError: It is of a kind that this version does not know.
    """
    loaders: dict[str, type[MeanToken | TfidfSvd | HiddenState]] = {
        "mean_token": MeanToken, "tfidf_svd": TfidfSvd, "hidden_state": HiddenState}
    kind = read_settings(directory)["kind"]
    if kind not in loaders:
        raise CheckpointError(str(directory), kind, f"no such kind of document vectors; known are {', '.join(loaders)}")
    return loaders[kind].load(directory, device)
