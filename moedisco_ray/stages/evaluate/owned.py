"""Measure a run's models on the held-out text of a data owner, on one of the owner's nodes; only figures leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moedisco_ray.core.store.locations import CORPUS
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.models import specialise
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.scoring import default_dtype, perplexity
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.validation import load_documents, validation_parts


def evaluate_owned(
    models: Mapping[str, Path],
    *,
    owner_store: RunStore,
    tokenizer: Path,
    max_tokens: int,
    sequence_length: int,
    device: str,
) -> dict[str, Any]:
    """Measure models on the held-out text of a data owner; one decoder layer is in memory at a time.

    Args:
        models: Model directory of each stage; `finetune` is required.
        owner_store: The run's folder in the owner's storage.
        tokenizer: Directory of the run's tokenizer.
        max_tokens: Maximum tokens to measure on.
        sequence_length: Length of a training sequence.
        device: Device that the models run on.

    Returns:
        The fields of `OwnerFigures`.
    """
    corpus = owner_store.directory / CORPUS
    with owner_store.using(corpus / "validation"):
        documents = load_documents(validation_parts(corpus), max_tokens)
    prefix = Encoder(tokenizer).prefix
    stages = {
        stage: perplexity(
            specialise(open_streamed(model, dtype=default_dtype(device), device=device)),
            documents,
            prefix=prefix,
            sequence_length=sequence_length,
        ).to_dict()
        for stage, model in models.items()
    }
    return {**stages.pop("finetune"), "stages": stages}
