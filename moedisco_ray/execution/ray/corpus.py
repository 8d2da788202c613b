"""The corpus stage on Ray Data: reading tasks and bucket tasks are the rows of a data set each.

The tasks read and write files that all nodes see; what flows through Ray are their descriptions and reports, a few
kilobytes each. So the object store stays empty however large the corpus is, a task that died is run again by Ray, and
the result does not depend on blocks: everything that decides over a document is in `moedisco_ray.stages.corpus`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray.data

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.stages.corpus import build

T = TypeVar("T")
R = TypeVar("R")


def build_corpus(config: RunConfig, directory: Path, blocks: int | None = None) -> dict[str, Any]:
    """Make the corpus artifact in `directory`, on the Ray cluster this process is connected to.

    Args:
        config: The run's configuration.
        directory: An empty directory that all nodes see.
        blocks: In how many blocks Ray Data holds the tasks; None: a task each. The result is the same.

    Returns:
        The stage's figures, as `corpus.build` gives them.

    Raises:
        UserError: As `corpus.build`.
    """
    def on_ray_data(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        return _map_tasks(f"{config.name}-corpus", function, items, blocks)

    return build(config, directory.absolute(), on_ray_data)


def _map_tasks(name: str, function: Callable[[T], R], items: Sequence[T], blocks: int | None) -> Iterator[R]:
    rows = [{"task": pickle.dumps((function, item))} for item in items]
    tasks = ray.data.from_items(rows, override_num_blocks=min(blocks or len(rows), len(rows)))
    mapped = tasks.map(_run_task)
    mapped.set_name(name)
    for row in mapped.iter_rows():
        outcome = pickle.loads(row["outcome"])  # noqa: S301  # written by the task a moment ago
        if isinstance(outcome, MoeDiscoError):
            raise outcome
        yield outcome


def _run_task(row: dict[str, bytes]) -> dict[str, bytes]:
    function, item = pickle.loads(row["task"])  # noqa: S301  # written by the driver a moment ago
    try:
        outcome = function(item)
    except MoeDiscoError as error:
        outcome = error     # as a value: Ray would wrap it in a traceback of its own, and try again
    return {"outcome": pickle.dumps(outcome)}
