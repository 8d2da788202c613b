"""Document vectors: one small class per kind, with a common interface.

Vectors of the kind `random` are already the costs of a document in each cluster, so they need no centroids.
"""

from __future__ import annotations

from pathlib import Path

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, adjust, read_settings
from moedisco_ray.stages.clustering.vectors.random import RandomCosts

__all__ = ["FitInputs", "Vectoriser", "adjust", "kind", "load_vectoriser"]

_KINDS = ("mean_token", "tfidf_svd", "hidden_state", "random")


def kind(name: str) -> type[Vectoriser]:
    """The vectoriser class that the setting `clusters.vectors` calls `name`.

    Raises:
        CheckpointError: No kind of document vectors has this name.
    """
    # These imports are local because torch, transformers and scikit-learn take seconds to import. Workers that only
    # hold vectors do not need them.
    match name:
        case "mean_token":
            from moedisco_ray.stages.clustering.vectors.mean_token import MeanToken

            return MeanToken
        case "tfidf_svd":
            from moedisco_ray.stages.clustering.vectors.tfidf import TfidfSvd

            return TfidfSvd
        case "hidden_state":
            from moedisco_ray.stages.clustering.vectors.hidden_state import HiddenState

            return HiddenState
        case "random":
            return RandomCosts
    raise CheckpointError("clusters.vectors", name, f"no such document vectors; use one of {', '.join(_KINDS)}")


def load_vectoriser(directory: Path, device: str = "cpu") -> Vectoriser:
    """Load a vectoriser of any kind that `Vectoriser.save` wrote.

    Args:
        directory: Directory of the vectoriser.
        device: Device for the vectoriser's model, if it has one.

    Raises:
        CheckpointError: This version does not know the vectoriser's kind.
    """
    return kind(read_settings(directory)["kind"]).load(directory, device)
