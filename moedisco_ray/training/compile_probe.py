"""Decide in the first step of a training whether its layers run compiled: if that computes the same, and faster.

A micro-batch is computed as it is, and compiled; its loss, the norm of its gradient, and its time are compared. Nothing
of it is kept, so the training is the same as without the probe. The compiler takes a minute or more, so a short
training is not compiled.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

import torch

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.printable import one_line
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.training.compiled import Switch
from moedisco_ray.training.job import TrainJob, World

LEAST_SECONDS = 1800.0
"""Time that a training must take for the compiler to be tried (s); the compiler itself takes up to some minutes."""
_FASTER = 0.95
"""Largest time of a compiled micro-batch, as a share of its time without the compiler."""
_ERRORS = {torch.bfloat16: (0.01, 0.05), torch.float32: (1e-4, 1e-3)}
"""Largest relative differences of loss and gradient by which each arithmetic may round in another way."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One micro-batch.

    Attributes:
        loss: Sum of its cross-entropy.
        norm: Norm of its gradient.
        seconds: Time of its forward and backward pass (s).
    """

    loss: float
    norm: float
    seconds: float


def may_compile(job: TrainJob, world: World) -> bool:
    """Whether a training's layers are compiled if the probe finds that it pays.

    The probe is for one worker on a GPU. What recomputes its activations has nothing to compile. Blocks, adapters, and
    documents by themselves would be compiled again in later steps.
    """
    recipe = job.optimizer
    others = (recipe.gradient_checkpointing, recipe.block_steps, recipe.within_documents, job.lora, job.deterministic)
    on_one_gpu = world.size == 1 and torch.device(world.device).type == "cuda"
    return recipe.compile is None and on_one_gpu and not any(others)


def probe(
    compiling: Callable[[], Switch],
    measure: Callable[[], Trial],
    passes: int,
    name: str,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Compile layers, and leave the switch on if they compute the same as before, faster.

    Args:
        compiling: Compiles the layers, and returns their switch.
        measure: Computes the same micro-batch each time.
        passes: Micro-batches that are left to compute.
        name: Name of the training in its log.
        dtype: Dtype in which the forward and backward pass compute.
    """
    measure()  # libraries are loaded
    plain = measure()
    if plain.seconds * passes < LEAST_SECONDS:
        return
    log, switch = logging.getLogger(f"moedisco.{name}"), Switch()
    try:
        switch = compiling()
        measure()  # the compiler runs
        compiled = measure()
    # this machine has no compiler, the compiler fails, or memory is too small
    except (ConfigError, RuntimeError, OSError) as error:
        switch.on = False
        log.warning("layers are not compiled: %s", one_line(first_line(error)))
        return
    of_loss, of_norm = _ERRORS[dtype]
    same = math.isclose(compiled.loss, plain.loss, rel_tol=of_loss) and math.isclose(
        compiled.norm, plain.norm, rel_tol=of_norm
    )
    switch.on = same and compiled.seconds <= _FASTER * plain.seconds
    decided = "compiled" if switch.on else "not compiled"
    log.info("layers are %s; a micro-batch takes %.3f s, not %.3f", decided, compiled.seconds, plain.seconds)
    log.info("loss %.6g, not %.6g; gradient %.4g, not %.4g", compiled.loss, plain.loss, compiled.norm, plain.norm)
