"""One worker of a gang on gloo: runs the jobs it is handed one after the other and writes their results.

Usage: training_worker.py RANK SIZE RENDEZVOUS WORK
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moedisco_ray.core.errors import TrainingError
from moedisco_ray.core.events import Event
from moedisco_ray.training import World, consensus, train

STOP = 8


@dataclasses.dataclass(frozen=True)
class Counting:
    """Held-out text: each token is one more than the one before it; the last target is none."""

    every: int = 4
    files: tuple[Path, ...] = ()

    def batches(self, batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        tokens_BL = torch.arange(1, 19).reshape(2, 9)
        targets_BL = tokens_BL[:, 1:].clone()
        targets_BL[1, -1] = -100
        yield tokens_BL[:, :-1], targets_BL


def main(rank: int, size: int, rendezvous: str, work: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=30))
    usual = consensus._POLL_SECONDS
    results: dict[str, object] = {}
    for job, stopper in pickle.loads(work.read_bytes()):
        try:
            # Who is to stop after a certain step is asked after each; the others are, whenever it is time to.
            consensus._POLL_SECONDS = usual if stopper is None else 0.0
            asked = itertools.count(1)
            events: list[Event] = []
            results[job.name] = train(
                job, World(rank, size), events.append, lambda s=stopper, asked=asked: next(asked) >= STOP and rank == s)
            results[f"{job.name}-looks"] = [event.data for event in events if event.type == "evaluation"]
        except TrainingError as error:
            results[job.name] = str(error)
    work.with_name(f"{work.name}.{rank}").write_bytes(pickle.dumps(results))
    dist.barrier()
    os._exit(0)     # gloo's threads can abort an interpreter that ends in the usual way


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
