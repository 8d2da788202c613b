"""Adam's moments of a model (Kingma and Ba, arXiv 1412.6980, algorithm 1), as they pass from one training to the next.

    MOMENTS/exp_avg/      means of the gradients, a model directory: each under its weight's name, in its shape
            exp_avg_sq/   means of their squares, the same
            steps.json    how many updates they are of

A training that goes on from another's weights without them makes its first updates with the full learning rate in every direction,
for after one step m / sqrt(v) is a sign. That costs what the other had learnt last: see `submodels.keep_moments` in the results of
`benchmarks/quality`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.models import open_checkpoint, write_checkpoint

Kind = Literal["exp_avg", "exp_avg_sq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FOLDER = "moments"
"""In a trained model's directory."""
_STEPS = "steps.json"


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of a trained model, or of what was made of several.

    Attributes:
        steps: Updates that they are of.
        tensors: Canonical tensors of each kind; those of weights that did not learn are zero.
    """

    steps: int
    tensors: Mapping[Kind, Mapping[str, Tensor]]


def open_moments(directory: Path) -> Moments | None:
    """What lies in a directory, each tensor read when it is asked for; None: nothing does.

    Raises:
        CheckpointError: It cannot be read.
    """
    if not (directory / _STEPS).is_file():
        return None
    return Moments(read_json(directory / _STEPS)["steps"], {kind: open_checkpoint(directory / kind) for kind in KINDS})


def write_moments(
    directory: Path, tensors: Callable[[Kind], Iterable[tuple[str, Tensor]]], steps: int, config: Mapping[str, Any],
) -> None:
    """Write a directory, at most a file of it in memory.

    Args:
        directory: Where to.
        tensors: Makes the canonical tensors of a kind.
        steps: Updates that they are of.
        config: The model's `config.json`.

    Raises:
        OSError: The disk is full or broken.
    """
    for kind in KINDS:
        write_checkpoint(directory / kind, tensors(kind), config)
    write_json(directory / _STEPS, {"steps": steps})
