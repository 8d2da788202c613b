"""The cluster stage on Ray.

The run's seats, or tasks where no model is needed, write the vectors once. Then a few actors each load some of these vector files
and keep them for all Lloyd steps; a step sends the centroids and returns sums and counts. A `map_batches` or
aggregation per step would be shorter, but it plans and starts a new execution every time (0.1 s or more, against milliseconds for a
call), and loses the distances that an actor keeps from the last step to save most of the computation. Sums are exact: neither
the number of actors nor the restart of one changes a bit of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import ray

from moedisco_ray.backend import vectors_kind
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.events import Emit, StageProgress
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.event_mailbox import attempt_emitter, open_mailbox
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.tasks import Slot
from moedisco_ray.stages.clustering.build import build_clusters as build
from moedisco_ray.stages.clustering.store import Shard, embed_parts

T = TypeVar("T")
R = TypeVar("R")


def build_clusters(
    config: RunConfig, *, corpus_dir: Path, model_dir: Path, directory: Path, emit: Emit, stop: StopFile, seats: Seats,
) -> dict[str, Any]:
    """Run `clustering.stage.build_clusters` on the connected Ray cluster.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The model from which `mean_token` and `hidden_state` take their vectors.
        directory: Directory of the new artifact; all nodes must see it.
        emit: Receives the events about held slots, and `stage_progress` events.
        stop: Ends the wait for a slot.
        seats: The run's seats, which compute vectors.

    Raises:
        RunStopped: The run was asked to end before a slot was free.
    """
    node_types = config.pools.low_memory.node_types
    node_type = vectors_kind(config, model_dir, {each.key: session.slots(each) for each in node_types})
    workers = RayWorkers(Slot(node_type, emit, stop, seats))
    return build(config, corpus_dir, model_dir, directory, workers, emit=emit)


@dataclasses.dataclass
class RayWorkers:
    """`clustering.stage.Workers` with seats, actors and tasks.

    Attributes:
        slot: Where vectors are computed.
        max_actors: Maximum number of actors that keep vectors; None: one per CPU.
    """

    slot: Slot
    max_actors: int | None = None
    _actors: list[Any] = dataclasses.field(default_factory=list)

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write the documents' vectors, on all slots at once. A slot that is lost repeats its parts on another."""
        pool = self.slot.pool
        slots = _cpus() if pool is None else session.room(pool, 1)
        count = max(1, min(slots, len(parts)))
        files = [path.resolve() for path in parts]
        with (
            open_mailbox(lambda event: progress.add(event.data["done"])) as mailbox,
            ThreadPoolExecutor(count, thread_name_prefix="vectors") as threads,
        ):
            def embed(share: Sequence[Path]) -> None:
                self.slot.run(
                    embed_parts, share, vectoriser=vectoriser.resolve(), directory=directory.resolve(),
                    events=attempt_emitter(mailbox.handle, ""), device="cuda" if pool is not None and pool.gpu else "cpu")

            list(threads.map(embed, [files[i::count] for i in range(count)]))

    def hold(self, files: Sequence[Path]) -> None:
        """Start one actor per CPU, at most one per file; Ray restarts an actor whose node is lost."""
        count = max(1, min(len(files), self.max_actors or _cpus()))
        # The actors request no CPU, because the request might never be granted.
        actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(Shard)
        self._actors = [actor.remote([path.resolve() for path in files[i::count]]) for i in range(count)]

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method of all actors at once."""
        stored = [ray.put(arg) for arg in args]
        return ray.get([getattr(actor, method).remote(*stored) for actor in self._actors])

    def release(self) -> None:
        """Stop the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def each(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """Apply the function to each item in a task of its own."""
        stored, call = ray.put(function), ray.remote(_call)
        running = [call.remote(stored, item) for item in items]
        while running:
            done, running = ray.wait(running)
            yield from ray.get(done)


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)


def _cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))
