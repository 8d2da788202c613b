"""What can be found out about a run's model and tokenizer before anything is made."""

from __future__ import annotations

from moedisco_ray.core.config import LocalInit, RunConfig
from moedisco_ray.core.errors import UserError
from moedisco_ray.models import canonical_shapes, check_start_tensors, hf_config
from moedisco_ray.stages.corpus.pretrained import check_tokenizer


def check_start(config: RunConfig) -> None:
    """Check that a run can begin: its tokenizer is the one of its model, and the tensors to start from fit the model.

    Takes seconds and reads no weights.

    Raises:
        ConfigError: As `check_tokenizer`, or the family cannot have the sizes in `model.config`.
        CheckpointError: As `check_start_tensors`.
    """
    for problem in start_problems(config)[:1]:
        raise problem


def start_problems(config: RunConfig) -> list[UserError]:
    """Every reason for which a run cannot begin with its model and tokenizer; none where it can."""
    problems: list[UserError] = []
    for check in (check_tokenizer, _check_tensors):
        try:
            check(config)
        except UserError as error:
            problems.append(error)
    return problems


def _check_tensors(config: RunConfig) -> None:
    check_start_tensors(config.model)
    if not isinstance(config.model.init, LocalInit):
        rows = config.model.architecture.vocab_size or config.tokenizer.train_vocab_size
        canonical_shapes(hf_config(config.model.family, config.model.architecture, rows, config.corpus.sequence_length, 0))
