"""Orthogonalise the matrices of a sharded model once per gang: each worker takes some of them.

Each worker holds rows of every matrix, and an orthogonal matrix needs all rows. So the workers send the rows of a
matrix to the worker that computes it, and it returns the rows of the result. If every worker gathered every matrix,
each would compute all of them, and receive W / 2 times as many bytes in a gang of W.

Axes: A rows of a matrix, B columns, N rows that one worker has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from moedisco_ray.core.limits import STEP_ELEMENTS
from moedisco_ray.plan.muon_flops import newton_schulz_flops

Orthogonalise = Callable[[Tensor], Tensor]


def sharing_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The workers that have rows of a matrix; None if it is no matrix, or whole on this worker."""
    if not isinstance(parameter, DTensor) or parameter.ndim != 2:
        return None
    mesh = parameter.device_mesh
    axes = [axis for axis, placed in enumerate(parameter.placements) if placed == Shard(0) and mesh.size(axis) > 1]
    return mesh.get_group(axes[0]) if axes else None


def windows(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide parameters into runs of neighbours whose shared matrices are exchanged at once.

    A run has matrices of up to `STEP_ELEMENTS` elements per worker, which limits the memory of the exchange, but at
    least one matrix per worker.
    """
    run, elements, matrices = list[Tensor](), 0, 0
    for parameter in parameters:
        group = sharing_group(parameter)
        run.append(parameter)
        if group is None:
            continue
        elements, matrices, workers = elements + parameter.numel(), matrices + 1, dist.get_world_size(group)
        if matrices >= workers and elements >= STEP_ELEMENTS * workers:
            yield run
            run, elements, matrices = [], 0, 0
    if run:
        yield run


def owners(shapes: Sequence[Sequence[int]], workers: int) -> list[int]:
    """The worker that computes each matrix, so that all have about as much to compute.

    The most expensive matrices come first, each to the worker that has the least so far.

    Args:
        shapes: Rows and columns of the matrices.
        workers: Number of workers.
    """
    loads, found = [0] * workers, [0] * len(shapes)
    for number in sorted(range(len(shapes)), key=lambda number: -newton_schulz_flops(*shapes[number])):
        found[number] = min(range(workers), key=loads.__getitem__)
        loads[found[number]] += newton_schulz_flops(*shapes[number])
    return found


def orthogonal_rows(
    parameters: Sequence[DTensor], updates_NB: list[Tensor], orthogonalise: Orthogonalise
) -> list[Tensor]:
    """This worker's rows of the orthogonalised updates of matrices that a gang shares; every worker must call it.

    Args:
        parameters: The matrices; one group of workers has the rows of all of them.
        updates_NB: This worker's rows of their updates, fp32. The list is emptied, so that the caller does not hold
            what is sent.
        orthogonalise: Computes a whole update.
    """
    if not parameters:
        return []
    group = sharing_group(parameters[0])
    workers, rank = dist.get_world_size(group), dist.get_rank(group)
    shapes = [tuple(each.shape) for each in parameters]
    of_worker = owners(shapes, workers)
    rows = [_rows(shape[0], workers) for shape in shapes]
    sizes = [_sizes(shape, workers) for shape in shapes]
    # what is sent: this worker's rows of all matrices, by the worker that computes them
    order = sorted(range(len(shapes)), key=of_worker.__getitem__)
    own = [m for m in order if of_worker[m] == rank]
    to_owner, from_worker = [0] * workers, [0] * workers
    for m in order:
        to_owner[of_worker[m]] += sizes[m][rank]
    for worker, m in itertools.product(range(workers), own):
        from_worker[worker] += sizes[m][worker]
    sent = torch.cat([updates_NB[m].reshape(-1) for m in order])
    updates_NB.clear()
    received = _exchanged(sent, to_owner, from_worker, group)
    del sent
    # what is received: rows of the matrices that this worker computes, by the worker that has them; then the results
    pieces = dict(
        zip(
            itertools.product(range(workers), own),
            torch.split(received, [sizes[m][worker] for worker, m in itertools.product(range(workers), own)]),
            strict=True,
        )
    )
    for m in own:
        found_AB = orthogonalise(torch.cat([pieces[worker, m] for worker in range(workers)]).view(shapes[m]))
        for worker, found_NB in enumerate(torch.split(found_AB, rows[m])):
            pieces[worker, m].view_as(found_NB).copy_(found_NB)
    returned = _exchanged(received, from_worker, to_owner, group)
    parts = dict(zip(order, torch.split(returned, [sizes[m][rank] for m in order]), strict=True))
    return [parts[m].view(-1, shape[1]) for m, shape in enumerate(shapes)]


def _rows(count: int, workers: int) -> list[int]:
    """Rows of a matrix that each worker has, as `DTensor` divides them."""
    most = -(-count // workers)
    return [max(0, min(most, count - most * worker)) for worker in range(workers)]


def _sizes(shape: Sequence[int], workers: int) -> list[int]:
    """Elements of a matrix that each worker has."""
    return [count * shape[1] for count in _rows(shape[0], workers)]


def _exchanged(sent: Tensor, to_each: list[int], from_each: list[int], group: dist.ProcessGroup | None) -> Tensor:
    received = sent.new_empty(sum(from_each))
    dist.all_to_all_single(received, sent, from_each, to_each, group=group)
    return received
