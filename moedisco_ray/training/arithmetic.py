"""How torch computes while it trains: with or without deterministic kernels, and with or without TF32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.printable import one_line
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.sharding import compute_dtype

_WORKSPACE = ":4096:8"
"""Workspaces with which cuBLAS adds in one order: eight of 4 MiB."""
_REFUSED = "use_deterministic_algorithms"
"""Part of torch's error about an operation without a deterministic form."""


@contextlib.contextmanager
def arithmetic_of(job: TrainJob, world: World) -> Iterator[None]:
    """Compute as the job asks for until the block ends.

    With `deterministic`, torch takes deterministic kernels, also for attention, whose usual backward pass adds in no
    fixed order on a GPU. A training in bf16 computes its few products in fp32 with TF32, which keeps 10 bits of a
    factor where bf16 keeps 7; a training in fp32 does not.

    Raises:
        ConfigError: The training needs an operation that has no deterministic form.
    """
    was_deterministic, products = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    in_bf16 = torch.device(world.device).type == "cuda" and compute_dtype(job.optimizer, world.device) is torch.bfloat16
    torch.set_float32_matmul_precision("high" if in_bf16 else products)
    if job.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACE)
        _set_deterministic(mode=True)
    try:
        yield
    except RuntimeError as error:
        if not job.deterministic or _REFUSED not in str(error):
            raise
        operation = one_line(str(error).partition(" does not have")[0])
        remedy = f"torch computes {operation} on {world.device} in no fixed order; set it to false"
        raise ConfigError("deterministic", value=True, remedy=remedy) from error
    finally:
        _set_deterministic(mode=was_deterministic)
        torch.set_float32_matmul_precision(products)


def _set_deterministic(*, mode: bool) -> None:
    if torch.are_deterministic_algorithms_enabled() != mode:  # the call imports torch's compiler, which takes seconds
        torch.use_deterministic_algorithms(mode)
        # else each new tensor would be filled
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
