"""The start of a run: the untrained MoE, and checks of the configured start model and tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moedisco_ray.core.config import CheckpointInit, LocalInit, Model, RunConfig, UpcycleInit
from moedisco_ray.core.config.start_files import start_directory, start_with_weights
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.store.verification import Verifier
from moedisco_ray.models import (
    ModelMap,
    canonical_shapes,
    check_start_tensors,
    config_values,
    hf_config,
    open_checkpoint,
    open_dense,
    random_weights,
    read_config,
    read_generation_config,
    submodel_config,
    upcycled_config,
)
from moedisco_ray.models.initial_weights import with_seed
from moedisco_ray.models.upcycled_experts import split_experts, with_new_units
from moedisco_ray.stages.text.given_tokens import check_sources
from moedisco_ray.stages.text.pretrained import check_tokenizer
from moedisco_ray.stages.text.tokenizer import Encoder


@dataclasses.dataclass(frozen=True)
class Start:
    """What the untrained MoE is built from.

    Attributes:
        model: The run's model section.
        tokenizer: Directory of the corpus' tokenizer, which gives the vocabulary and the end-of-text token.
        sequence_length: Tokens of a training sequence.
        seed: Seed of random tensors.
        verifier: Verifies the weights of the model that `model.init` names.
    """

    model: Model
    tokenizer: Path
    sequence_length: int
    seed: int
    verifier: Verifier = dataclasses.field(default_factory=Verifier, compare=False)


def untrained_moe(start: Start) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The whole MoE before any training: its tensors, each read or drawn on access, and its `config.json`.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: The family cannot have these sizes.
    """
    model, init = start.model, start.model.init
    if isinstance(init, CheckpointInit):
        # transformers would not train the padding token's embedding. The export restores the token.
        directory, left_out = (
            start_with_weights(init, start.verifier),
            DECLARATIONS[model.family_name].prediction_layers_field,
        )
        config = {**read_config(directory), "pad_token_id": None} | ({} if left_out is None else {left_out: 0})
        return open_checkpoint(directory), config
    if isinstance(init, UpcycleInit):
        directory, family = start_with_weights(init, start.verifier), model.family_name
        names, config = (
            ModelMap(family),
            upcycled_config(directory, family, init.num_experts, init.num_experts_per_tok, init.split),
        )
        tensors: Mapping[str, Tensor] = with_seed(
            open_dense(directory, family, init.num_experts), random_weights(config, start.seed), names
        )
        if init.split > 1:
            tensors = split_experts(tensors, names, init.split, whole_groups=init.num_experts_per_tok % init.split == 0)
        return tensors, config
    encoder = Encoder(start.tokenizer)
    sizes = hf_config(model.family_name, model.architecture, encoder.vocab_size, start.sequence_length, encoder.eos)
    config = config_values(sizes)
    return random_weights(config, start.seed), config


def whole_moe(
    start: Start, trained_seed: Path | None, *, distinct_rows: bool = False
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The whole MoE before its experts are trained apart: untrained, or grown from a trained seed.

    Hidden units that `model.init.reinitialise` draws anew are new in this model only: a seed trains the dense model as
    it is.

    Args:
        start: Settings and files of the untrained MoE.
        trained_seed: The trained seed model; None if none was trained.
        distinct_rows: Whether copies of an expert get different router rows, see `with_seed`.

    Raises:
        CheckpointError: A model cannot be read.
    """
    tensors, config = untrained_moe(start)
    names, init = ModelMap(start.model.family_name), start.model.init
    if trained_seed is not None:
        tensors = with_seed(open_checkpoint(trained_seed), tensors, names, distinct_rows=distinct_rows)
    if isinstance(init, UpcycleInit) and init.reinitialise:
        tensors = with_new_units(tensors, names, init.reinitialise, start.seed)
    return tensors, config


def start_model(start: Start) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The trained model that a run starts from, as an MoE: its tensors, each read on access, and its `config.json`.

    A dense model is an MoE with one expert, which computes the same.

    Raises:
        CheckpointError: The model cannot be read.
    """
    init = start.model.init
    if not isinstance(init, UpcycleInit):
        return untrained_moe(start)
    directory, family = start_with_weights(init, start.verifier), start.model.family_name
    config = upcycled_config(directory, family, init.num_experts, init.num_experts_per_tok)
    return open_dense(directory, family, init.num_experts), submodel_config(config, 1)


def check_start(config: RunConfig) -> None:
    """Check that a run can begin: its tokenizer is the one of its model, and the tensors to start from fit the model.

    Takes seconds and reads no weights.

    Raises:
        ConfigError: The tokenizer does not fit (see `check_tokenizer`), or the family cannot have the sizes in
            `model.config`.
        CheckpointError: The tensors do not fit (see `check_start_tensors`).
    """
    for problem in start_problems(config)[:1]:
        raise problem


def start_problems(config: RunConfig) -> list[UserError]:
    """All errors that prevent a run from starting with its model and tokenizer; empty if it can start."""
    problems: list[UserError] = []
    for check in (check_tokenizer, check_sources, _check_tensors):
        try:
            check(config)
        except UserError as error:
            problems.append(error)
    return problems


def _check_tensors(config: RunConfig) -> None:
    check_start_tensors(config.model)
    if isinstance(config.model.init, LocalInit):
        read_generation_config(start_directory(config.model.init))  # the export copies it, at the end of the run
    else:
        rows = config.model.architecture.vocab_size or config.tokenizer.train_vocab_size
        canonical_shapes(
            hf_config(config.model.family_name, config.model.architecture, rows, config.corpus.sequence_length, 0)
        )
