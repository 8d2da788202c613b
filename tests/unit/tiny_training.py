"""A tiny MoE, a tiny shard, and a job over them, for tests of the training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moedisco_ray.core.config import Architecture, FamilyName, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import hf_config, open_checkpoint, routers, save_model, skeleton
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.training import TrainJob, TrainResult, World, train

L, V, BATCH = 16, 64, 6
RECIPE = Optimizer(lr=3e-3, batch_tokens=BATCH * L, schedule="cosine", warmup=0.2)


def never() -> bool:
    return False


def ignore(event: Event) -> None:
    pass


def write_shard(directory: Path) -> None:
    rng = np.random.Generator(np.random.Philox(key=[1, 2]))
    # A walk with small steps: there is something to learn.
    documents = [np.cumsum(rng.integers(0, 3, size=80)) % (V - 1) + 1 for _ in range(20)]
    write_packed(directory, [documents], 0, V)


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """Three batches of unequal length to evaluate."""

    every: int = 2
    files: tuple[Path, ...] = ()

    def batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        for length in (L, L // 2, L):
            ids_BL = torch.arange(3 * length).view(3, length) % V
            yield ids_BL, ids_BL.roll(-1, dims=1)


def write_tiny(
    directory: Path,
    experts: int,
    *,
    family: FamilyName = "qwen3_moe",
    tied: bool = False,
    favourite: int | None = None,
    layers: int = 2,
) -> None:
    sizes = Architecture(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        moe_intermediate_size=24,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        tie_word_embeddings=tied,
    )
    config = hf_config(family, sizes, V, L, 0)
    torch.manual_seed(0)
    model = type(skeleton(config))(config)
    for router in routers(model).values():
        torch.nn.init.normal_(router.weight, std=0.1)
        if favourite is not None:
            router.weight.data[favourite] += 0.2
    if favourite is not None:  # every token then has something in common that the router can like
        model.model.embed_tokens.weight.data += 0.05
    save_model(model, directory)


def variant(job: TrainJob, name: str, **changes: Any) -> TrainJob:
    return dataclasses.replace(
        job,
        output=job.output.with_name(f"{name}-out"),
        checkpoints=job.checkpoints.with_name(f"{name}-steps"),
        **changes,
    )


def run(
    job: TrainJob,
    emit: Callable[[Event], None] = ignore,
    stop: Callable[[], bool] = never,
    *,
    devices: tuple[str, ...] = (),
) -> TrainResult:
    return train(job, World(devices=devices), emit, stop)


def stop_after(steps: int) -> Callable[[], bool]:
    asked = iter(range(1, 10_000))
    return lambda: next(asked) >= steps


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(directory))
