"""The optimizer state in a model directory: Adam's moments for the next training (arXiv 1412.6980, algorithm 1).

For matrices that Muon trained, the first moment is Muon's momentum, and the second moment is zero.

    MODEL/optimizer_state/exp_avg/      first moments, as a model directory with the names and shapes of the weights
                          exp_avg_sq/   second moments, in the same form
                          steps.json    number of updates

Without this state, the first updates of the next training would move every weight by about the learning rate, because
the first moment divided by the root of the second is 1 or -1 after one step. That would undo part of what the previous
training has learnt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.models import open_checkpoint, write_checkpoint

Kind = Literal["exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OPTIMIZER_FOLDER = "optimizer_state"
"""Folder of the optimizer state in a model directory."""
_STEPS = "steps.json"


@dataclasses.dataclass(frozen=True)
class OptimizerState:
    """The optimizer state of a trained or merged model.

    Attributes:
        steps: Number of updates.
        tensors: Canonical tensors of `exp_avg` and `exp_avg_sq`; zero for weights that were not trained.
    """

    steps: int
    tensors: Mapping[Kind, Mapping[str, Tensor]]


def open_optimizer_state(directory: Path) -> OptimizerState | None:
    """Open an optimizer state, whose tensors are read on access; return None if the directory holds no such state.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if not (directory / _STEPS).is_file():
        return None
    return OptimizerState(
        read_json(directory / _STEPS)["steps"], {kind: open_checkpoint(directory / kind) for kind in KINDS}
    )


def write_optimizer_state(
    directory: Path, tensors: Callable[[Kind], Iterable[tuple[str, Tensor]]], steps: int, config: Mapping[str, Any]
) -> None:
    """Write an optimizer state. The tensors of at most one file are in memory at the same time.

    Args:
        directory: Target directory.
        tensors: Function that takes `exp_avg` or `exp_avg_sq` and yields the canonical tensors of this part of the
            state.
        steps: Number of updates.
        config: `config.json` values of the model.

    Raises:
        OSError: The disk is full or broken.
    """
    for kind in KINDS:
        write_checkpoint(directory / kind, tensors(kind), config)
    write_steps(directory, steps)


def write_steps(directory: Path, steps: int) -> Path:
    """Write the number of updates of an optimizer state; returns the file."""
    write_json(directory / _STEPS, {"steps": steps})
    return directory / _STEPS
