from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moedisco_ray.config import Pool, RunConfig
from moedisco_ray.events import Emit
from moedisco_ray.on_ray.cluster import build_clusters
from moedisco_ray.on_ray.corpus import build_corpus
from moedisco_ray.on_ray.tasks import run_on
from moedisco_ray.on_ray.trainers import train_all
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.shell import Placement, Trained
from moedisco_ray.stopping import NEVER, StopFile
from moedisco_ray.training import TrainJob

P = ParamSpec("P")
T = TypeVar("T")


class RayShell:
    """A `shell.Shell` on the connected Ray cluster; what Ray shows of a run begins with the run's name."""

    def __init__(self, run: str) -> None:
        self._run = run

    def build_corpus(self, config: RunConfig, directory: Path) -> dict[str, Any]:
        """Ray Data over the sources' files."""
        return build_corpus(config, directory)

    def build_clusters(self, config: RunConfig, corpus_dir: Path, model: Path, directory: Path) -> dict[str, Any]:
        """Ray Data over the documents."""
        return build_clusters(config, corpus_dir, model, directory)

    def call(self, pool: Pool | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """A Ray task that holds a slot of the pool."""
        return run_on(pool, function, *args, **kwargs)

    def train_all(
        self, jobs: Sequence[TrainJob], placement: Placement, directory: Path, emit: Emit, stop: StopFile = NEVER,
        quorum: Quorum = ALL,
    ) -> list[Trained]:
        """A Ray Train run per job."""
        return train_all(jobs, placement, directory, emit, stop, quorum, self._run)
