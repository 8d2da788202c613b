"""A worker of the gang in `test_shared_matrices`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from fake_steps import LiveBytes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moedisco_ray.training.muon import orthogonalised
from moedisco_ray.training.shared_matrices import orthogonal_rows


def compare(rank: int, workers: int, rendezvous: Path, shapes: Sequence[tuple[int, int]], output: Path) -> None:
    """Write whether shared matrices have the bits of those that each worker computes, and how many were computed.

    A third number is the most memory that the exchange of large matrices took (bytes per element of a worker's rows).
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=workers)
    computed = 0

    def orthogonalise(whole_AB: Tensor) -> Tensor:
        nonlocal computed
        computed += 1
        return orthogonalised(whole_AB[None])[0]

    mesh, random = init_device_mesh("cpu", (workers,)), torch.Generator().manual_seed(0)
    wholes = [torch.randn(shape, generator=random) for shape in shapes]
    parameters: list[DTensor] = [distribute_tensor(each, mesh, [Shard(0)]) for each in wholes]
    found = orthogonal_rows(parameters, [each.to_local() for each in parameters], orthogonalise)
    same = all(
        torch.equal(rows, distribute_tensor(orthogonalised(whole[None])[0], mesh, [Shard(0)]).to_local())
        for rows, whole in zip(found, wholes, strict=True)
    )
    output.with_name(f"{output.name}.{rank}").write_text(f"{same} {computed} {_memory(mesh, workers)}")
    dist.barrier()
    dist.destroy_process_group()


def _memory(mesh: DeviceMesh, workers: int) -> float:
    parameters: list[DTensor] = [distribute_tensor(torch.zeros(64, 64), mesh, [Shard(0)]) for _ in range(8 * workers)]
    shapes = [each.to_local().shape for each in parameters]
    elements = sum(shape.numel() for shape in shapes)
    with LiveBytes() as live:
        updates = [torch.zeros(shape) for shape in shapes]
        orthogonal_rows(parameters, updates, lambda whole_AB: whole_AB)
    return live.peak / elements
