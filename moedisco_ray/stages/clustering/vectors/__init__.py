"""Document vectors, each kind a small class behind one interface.

Of some kinds the vector is the document's cost in each cluster already, so that no centroids are needed: `random`, `likelihood`.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.stages.clustering.vectors.base import FitInputs, Vectoriser, adjust, read_settings

__all__ = ["FitInputs", "Vectoriser", "adjust", "kind", "load_vectoriser"]

# By name, so that a worker that only holds vectors, or only counts words, starts without torch and transformers.
_KINDS = {
    "mean_token": "mean_token:MeanToken",
    "tfidf_svd": "tfidf:TfidfSvd",
    "hidden_state": "hidden_state:HiddenState",
    "random": "random:RandomCosts",
    "likelihood": "likelihood:Likelihood",
}


def kind(name: str) -> type[Vectoriser]:
    """The class of a kind of document vectors, as `clusters.vectors` or `clusters.method` names it.

    Raises:
        CheckpointError: There is none of this name.
    """
    if name not in _KINDS:
        raise CheckpointError("clusters.vectors", name, f"no such document vectors; there are {', '.join(_KINDS)}")
    module, _, cls = _KINDS[name].partition(":")
    found: type[Vectoriser] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found


def load_vectoriser(directory: Path, device: str = "cpu") -> Vectoriser:
    """Read what `Vectoriser.save` wrote.

    Args:
        directory: Where it lies.
        device: Where a vectoriser with a model runs it.

    Raises:
        CheckpointError: It is of a kind that this version does not know.
    """
    return kind(read_settings(directory)["kind"]).load(directory, device)
