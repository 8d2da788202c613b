"""The corpus stage on Ray Data: each task of the stage is one row of a Ray data set.

The tasks read and write files of the run. Only task descriptions and reports, a few kilobytes each, pass through Ray.
So Ray's object store stays almost empty for a corpus of any size, and Ray can repeat a task that died. The result does
not depend on the number of Ray Data's blocks, because `moedisco_ray.stages.corpus` makes all decisions about documents.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.events import Emit, discard
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_work import unpickled
from moedisco_ray.stages.corpus import build

T = TypeVar("T")
R = TypeVar("R")

TASK_SHARE = 0.24
"""Share of a slot's tag that a task takes: four at a time and the function that runs them, because machines have about
four cores per GPU."""
CALL_SHARE = 0.02
"""Share of a slot's tag that a function takes which runs tasks."""


def build_corpus(config: RunConfig, directory: Path, blocks: int | None = None, emit: Emit = discard) -> dict[str, Any]:
    """Build the corpus artifact on the connected Ray cluster.

    Args:
        config: The run's configuration.
        directory: An empty directory below the run directory, for the artifact.
        blocks: Number of Ray Data blocks for the tasks; by default, one per task. The number does not change the
            result.
        emit: Receives `stage_progress` events.

    Returns:
        The stage's figures, as `corpus.build` returns them.

    Raises:
        UserError: As raised by `corpus.build`.
    """
    store = RunStore.of(config.location)

    def on_ray_data(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        return _map_tasks(f"{config.name}-corpus", function, items, blocks, store)

    return build(config, directory.absolute(), on_ray_data, emit=emit)


@dataclasses.dataclass(frozen=True)
class TaggedTasks:
    """Runs tasks on the nodes with a tag, next to their slots, a few per slot.

    The tasks take no CPUs, which such nodes need not offer.

    Attributes:
        tag: Custom resource of the nodes.
        store: Where the tasks' files are stored.
    """

    tag: str
    store: RunStore

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        """Apply the function to each item; yield the results in any order."""
        run = ray.remote(_run_owned_task).options(
            name=f"{self.tag}-corpus", num_cpus=0, resources={self.tag: TASK_SHARE}
        )
        running = [run.remote({"task": self.store.dumps((self.store, function, item))}) for item in items]
        while running:
            done, running = ray.wait(running)
            yield from map(_outcome, ray.get(done))


def _map_tasks(
    name: str, function: Callable[[T], R], items: Sequence[T], blocks: int | None, store: RunStore
) -> Iterator[R]:
    rows = [{"task": store.dumps((store, function, item))} for item in items]
    tasks = ray.data.from_items(rows, override_num_blocks=min(blocks or len(rows), len(rows)))
    mapped = tasks.map(_run_task)
    mapped.set_name(name)
    yield from map(_outcome, mapped.iter_rows())


def _outcome(row: dict[str, bytes]) -> Any:
    outcome = unpickled(row["outcome"])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _run_owned_task(row: dict[str, bytes]) -> dict[str, bytes]:
    """Like `_run_task`, but return any error.

    An error may quote a data owner's text, and Ray's head records what a task raises.
    """
    try:
        return _run_task(row)
    except Exception as error:  # noqa: BLE001 - the libraries that read text may raise anything
        kind = ValueError if isinstance(error, ValueError) else RuntimeError
        store, *_ = unpickled(row["task"])
        return {"outcome": store.dumps(kind("".join(traceback.format_exception(error))))}


def _run_task(row: dict[str, bytes]) -> dict[str, bytes]:
    store, function, item = unpickled(row["task"])
    try:
        outcome = function(item)
    except MoeDiscoError as error:
        outcome = error  # returned, not raised: Ray would wrap it in a traceback and repeat the task
    return {"outcome": store.dumps(outcome)}
