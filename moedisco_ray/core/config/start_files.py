"""Directories on this machine of the model that a run starts from, and of the tokenizer that it names."""

from __future__ import annotations

from pathlib import Path

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.sections import Tokenizer
from moedisco_ray.core.store.run_models import local_model, whole_model
from moedisco_ray.core.store.verification import Verifier


def start_directory(init: LocalInit) -> Path:
    """The Hugging Face directory on this machine from which a run starts.

    If the model is at a URI, it lacks the weights.

    Raises:
        CheckpointError: The URI holds no model, the hub cannot be reached, or the directory also holds an adapter.
        StorageError: The URI does not respond.
    """
    return whole_model(init.setting, local_model(init.setting, init.place, weights=False))


def start_with_weights(init: LocalInit, verifier: Verifier | None = None) -> Path:
    """Like `start_directory`, with the weights; `verifier` is that of `local_model`."""
    return whole_model(init.setting, local_model(init.setting, init.place, verifier=verifier))


def named_tokenizer(tokenizer: Tokenizer) -> Path | None:
    """The directory on this machine that `tokenizer.path` names; None if it is not set. Errors: see `local_model`."""
    return None if tokenizer.path is None else local_model("tokenizer.path", tokenizer.path, weights=False)
