"""Speed of exchanges among workers: within a node, between nodes, by NCCL and by gloo."""

from __future__ import annotations

import dataclasses
import datetime as dt
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Scope = Literal["within", "between"]

_REPEATS = 3
_SECONDS = 60.0
"""Time in which all workers must meet, and each exchange must end (s)."""
_GLOO_SHARE = 8
"""Factor by which an exchange by gloo is smaller than one by NCCL."""


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Where the workers of an exchange meet.

    Attributes:
        address: Address of the first worker's node.
        port: Free port there.
        nodes: Node of each worker, by rank.
        size: Bytes that an exchange moves.
    """

    address: str
    port: int
    nodes: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Speed of exchanges in one group of workers.

    Attributes:
        backend: Library of the exchange.
        scope: Whether the workers share a node, or each is on a node of its own.
        workers: Number of workers.
        all_reduce: Bytes per second that each worker sends in an all-reduce.
        all_to_all: The same in an all-to-all.
    """

    backend: str
    scope: Scope
    workers: int
    all_reduce: float
    all_to_all: float


def measure_exchanges(meeting: Meeting, rank: int, device: str) -> list[Exchange]:
    """Measure the groups that this worker is in. Every worker of the meeting must call it at once.

    Raises:
        RuntimeError: The workers do not reach each other, or an exchange does not end.
    """
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://{meeting.address}:{meeting.port}",
        rank=rank,
        world_size=len(meeting.nodes),
        timeout=dt.timedelta(seconds=_SECONDS),
    )
    try:
        found = list(_measured(meeting, rank, device, "nccl" if cuda else "gloo"))
        if cuda:
            found += _measured(dataclasses.replace(meeting, size=meeting.size // _GLOO_SHARE), rank, "cpu", "gloo")
    finally:
        dist.destroy_process_group()
    return found


def groups(nodes: Sequence[str]) -> list[tuple[Scope, list[int]]]:
    """Ranks of each group to measure: the workers of each node, and one worker of every node.

    Args:
        nodes: Node of each worker, by rank.
    """
    by_node: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        by_node.setdefault(node, []).append(rank)
    found: list[tuple[Scope, list[int]]] = [("within", ranks) for ranks in by_node.values() if len(ranks) > 1]
    if len(by_node) > 1:
        found.append(("between", [ranks[0] for ranks in by_node.values()]))
    return found


def _measured(meeting: Meeting, rank: int, device: str, backend: str) -> Iterator[Exchange]:
    for scope, ranks in groups(meeting.nodes):
        group = dist.new_group(ranks, backend=backend)  # every worker must make every group
        if rank in ranks:
            yield _rates(group, device, meeting.size, backend=backend, scope=scope)


def _rates(group: dist.ProcessGroup, device: str, size: int, *, backend: str, scope: Scope) -> Exchange:
    workers = dist.get_world_size(group)
    sent = torch.ones(size // 4 // workers * workers, device=device)
    received = torch.empty_like(sent)

    def all_reduce() -> None:
        dist.all_reduce(sent, group=group)

    def all_to_all() -> None:
        dist.all_to_all_single(received, sent, group=group)

    part = sent.nbytes * (workers - 1) / workers  # what each worker sends to others at least
    return Exchange(
        backend=backend,
        scope=scope,
        workers=workers,
        all_reduce=2 * part / _seconds(all_reduce, sent, group),
        all_to_all=part / _seconds(all_to_all, sent, group),
    )


def _seconds(exchange: Callable[[], None], data: Tensor, group: dist.ProcessGroup) -> float:
    taken = []
    for _ in range(_REPEATS + 1):  # the first one also connects the workers
        dist.barrier(group)
        began = time.perf_counter()
        exchange()
        if data.is_cuda:
            torch.cuda.synchronize(data.device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])
