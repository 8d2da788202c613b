"""Models that the arguments of a command name: dense models to merge, and any model to evaluate."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedModel

from moedisco_ray.core.config import Model, tokenizer_files
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.start_files import start_with_weights
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.records.outdated import check_model_up_to_date
from moedisco_ray.core.store.hub import HUB, is_hub_name
from moedisco_ray.core.store.locations import is_uri
from moedisco_ray.core.store.verification import Verifier
from moedisco_ray.models import check_start_tensors, read_config
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.evaluate.measure import open_start
from moedisco_ray.stages.scoring import default_dtype
from moedisco_ray.stages.start import Start


def dense_model(argument: str, place: str, *, experts: int = 1, per_token: int = 1) -> Model:
    """The model section of a run that would upcycle this model; checked against its directory.

    Args:
        argument: Argument of the command that names the model; errors name it.
        place: A directory, a GGUF file, the URI of a run's model, or a model of the hub as `ORG/NAME` or
            `hf://ORG/NAME@REVISION`.
        experts: Number of experts of the MoE.
        per_token: Number of experts per token.

    Raises:
        CheckpointError: The model cannot be read, or no family can start from it.
        ConfigError: The place names no model.
    """
    model = _named(argument, place, experts, per_token)
    with about(argument):
        model = with_start(model)
        check_start_tensors(model)
    return model


def open_model(argument: str, place: str, device: str) -> tuple[PreTrainedModel, Path]:
    """Open a model of a supported family, or a dense relative of one, to measure it; also returns its directory.

    A dense model is opened as an MoE with one expert, as the evaluation of a run opens a dense start. Its layers load
    their weights when they run.

    Args:
        argument: Argument of the command that names the model; errors name it.
        place: The model, as in `dense_model`.
        device: Device that the model runs on.

    Raises:
        CheckpointError: The model cannot be read, or is not supported.
        ConfigError: The place names no model, or the model has no tokenizer.
    """
    init, verifier = _named(argument, place, 1, 1).init, Verifier()
    with about(argument):
        directory = start_with_weights(init, verifier)  # type: ignore[arg-type]  # `_named` makes no other
    if not (directory / "config.json").is_file() or not tokenizer_files(directory):
        remedy = "holds no model and tokenizer; name a run's export, RUN_DIR/model, or a model with its tokenizer"
        raise ConfigError(argument, place, remedy)
    if not any(read_config(directory).get("model_type") in family.dense for family in DECLARATIONS.values()):
        return open_streamed(directory, dtype=default_dtype(device), device=device), directory
    return open_start(Start(dense_model(argument, place), directory, 0, 0, verifier), device), directory


@contextlib.contextmanager
def about(argument: str) -> Iterator[None]:
    """Change errors in the block: they name the command's argument instead of the setting of a run."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(argument, error.value, error.remedy) from error


def _named(argument: str, place: str, experts: int, per_token: int) -> Model:
    name, _, revision = place.removeprefix(HUB).partition("@")
    if not place.startswith(HUB):
        check_model_up_to_date(argument, place)
    exists = os.path.exists(place)  # noqa: PTH110 - it also returns False for an invalid name
    at_hub = place.startswith(HUB) or (not is_uri(place) and is_hub_name(name) and not exists)
    named = {"upcycle": HUB + name, "revision": revision or None} if at_hub else {"upcycle": place}
    try:
        return Model.model_validate({"init": {**named, "num_experts": experts, "num_experts_per_tok": per_token}})
    except ValidationError as error:
        raise ConfigError(argument, place, first_mistake(error.errors()).remedy) from error
