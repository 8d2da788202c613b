"""What every stage receives: the run's settings, the artifacts of earlier stages, and the backend that runs work."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from moedisco_ray.backend import Backend
from moedisco_ray.core.config import Pool, RunConfig, UpcycleInit
from moedisco_ray.core.config.pools import OwnerPool
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.records.summaries import ClusterSummary, Record
from moedisco_ray.core.stages import stage_named
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.artifacts import read_manifest, run_id
from moedisco_ray.core.store.locations import CORPUS, Location, first_line, joined, owned_location
from moedisco_ray.core.store.manifests import CHECKPOINTS
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_work import Files, on_files
from moedisco_ray.core.store.verification import Verifier
from moedisco_ray.policies.retrying import kind_of
from moedisco_ray.stages.start import Start

COMMON = "common"
"""Name of the folder, next to the trained sub-models, with the backbone that they shared after their last sync
point."""

T = TypeVar("T")
R = TypeVar("R", bound=Record)


@dataclasses.dataclass(frozen=True)
class DataOwner:
    """A data owner: nodes that work on its text, and a storage that its text does not leave.

    Attributes:
        name: Its name in `pools.owners`.
        cluster: The cluster that consists of its text.
        pool: Seats on its nodes.
        store: The run's files in its storage; only its nodes may read and write them.
    """

    name: str
    cluster: int
    pool: OwnerPool
    store: RunStore

    @property
    def shards(self) -> Path:
        """Its packed tokens."""
        return self.store.directory.absolute() / CORPUS / "shards"


@dataclasses.dataclass(frozen=True)
class Context:
    """What every stage receives in addition to the draft directory that it fills.

    Attributes:
        directory: The run directory.
        fingerprint: Fingerprint of the current stage.
        stop: File that requests a graceful stop of the run.
        own_storage: The run's own folder in `checkpoint.storage`; None to save checkpoints in the run directory.
        verifies: Whether files of earlier stages are verified before they are used.
        attempt: Id of this attempt to make the stage; see `verification.Verifier`.
        verifier: Verifies the model that the run starts from, once per machine.
    """

    config: RunConfig
    directory: Path
    fingerprint: str
    emit: Emit
    backend: Backend
    stop: StopFile = NEVER
    own_storage: Location | None = None
    verifies: bool = True
    attempt: str = ""
    verifier: Verifier = dataclasses.field(default_factory=Verifier, compare=False)

    @functools.cached_property
    def store(self) -> RunStore:
        """Storage of the run and its artifacts."""
        return RunStore.of(self.config.location, verifies=self.verifies, attempt=self.attempt)

    def call(
        self,
        pool: Pool | None,
        files: Files,
        function: Callable[..., T],
        *args: Any,
        smaller: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> T:
        """Call a pure function on one worker of a pool and meter its time; without a pool, on any node, unmetered.

        Args:
            pool: The pool; None means any node.
            files: Files of the run that the function reads and writes.
            function: The function.
            args: Positional arguments of the function.
            smaller: Named arguments of a second call, which takes less memory, if the first one runs out of it; None:
                there is no second call.
            kwargs: Named arguments of the function.
        """
        work = on_files(self.store, files, function, *args, **kwargs)
        try:
            return self.backend.call(pool, self.emit, self.stop, work)
        except RuntimeError as error:  # torch's own, or that of the worker on which it was raised
            if smaller is None or kind_of(f"{type(error).__name__}: {error}", node_lost=False) != "out_of_memory":
                raise
            reason = f"{function.__name__} ran out of memory and is tried once more with less: {first_line(error)}"
        self.emit(Event("warning", data={"message": reason}))
        work = on_files(self.store, files, function, *args, **{**kwargs, **smaller})
        return self.backend.call(pool, self.emit, self.stop, work)

    def call_with_events(
        self,
        pool: Pool | None,
        files: Files,
        function: Callable[..., T],
        *args: Any,
        smaller: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> T:
        """Like `call`, for a function with a parameter `events`: an `Emit` that works on any worker."""
        with self.backend.reachable(self.emit) as events:
            return self.call(pool, files, function, *args, smaller=smaller, events=events, **kwargs)

    def call_without_slot(self, pool: Pool, files: Files, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Like `call`, on one of a pool's nodes, but without a slot and unmetered."""
        return self.backend.call_without_slot(
            pool, self.emit, self.stop, on_files(self.store, files, function, *args, **kwargs)
        )

    def of(self, stage: str) -> Path:
        """The committed artifact of an earlier stage."""
        return self.directory / stage_named(stage).directory

    def checkpoints(self, stage: str) -> Path:
        """Folder in which a stage's trainers keep what they need to resume; one per fingerprint."""
        return self.directory / "checkpoints" / f"{stage}-{self.fingerprint[:12]}"

    def storage(self, stage: str) -> Location:
        """Folder of the checkpoints of a stage's trainers: in `checkpoint.storage` if that is set, else in the run."""
        local = self.checkpoints(stage)
        if self.own_storage is not None:
            return joined(self.own_storage, local.name)
        return joined(self.store.location, CHECKPOINTS, local.name) if self.store.is_remote else local

    @functools.cached_property
    def owners(self) -> tuple[DataOwner, ...]:
        """The data owners, in the order of their clusters."""
        config = self.config
        places = [
            owned_location(config.pools.owners[name].storage, config.name, run_id(self.directory))
            for name in config.owners
        ]
        stores = [RunStore.of(place, verifies=self.verifies, attempt=self.attempt) for place in places]
        clusters = range(config.shared_clusters, config.cluster_count)
        return tuple(map(DataOwner, config.owners, clusters, config.pools.of_owners, stores))

    def summary(self, stage: str, kind: type[R]) -> R:
        """The summary of an earlier stage."""
        manifest = read_manifest(self.of(stage))
        return kind.model_validate(manifest.summary if manifest else {})

    @property
    def start(self) -> Start:
        """The settings and files from which the untrained MoE is built."""
        config = self.config
        return Start(
            config.model, self.of("corpus") / "tokenizer", config.corpus.sequence_length, config.seed, self.verifier
        )

    @property
    def submodels(self) -> list[Path]:
        """The trained sub-models, in the clusters' order; empty if their share of the tokens is 0."""
        return (
            [self.of("submodels") / str(k) for k in range(self.config.cluster_count)]
            if self.config.tokens.decoupled
            else []
        )

    @property
    def trained_seed(self) -> Path | None:
        """The trained seed model; None if none was trained."""
        return self.of("seed") if self.config.tokens.seed else None


def dense_seed(config: RunConfig) -> int:
    """Random seed for the order of batches in the seed phase.

    A run that starts from a dense model uses another seed: an earlier run with the same seed may have trained that
    model, and the same batches should not come in the same order again.
    """
    return config.seed + (2 + config.cluster_count if isinstance(config.model.init, UpcycleInit) else 0)


def submodel_seed(config: RunConfig, cluster: int) -> int:
    """Random seed for the order of a sub-model's batches."""
    return config.seed + 1 + cluster


def finetune_seed(config: RunConfig) -> int:
    """Random seed for the order of the fine-tune's batches."""
    return config.seed + 1 + config.cluster_count


def cluster_tokens(context: Context) -> list[int]:
    """Number of tokens of each cluster."""
    return [entry.tokens for entry in context.summary("cluster", ClusterSummary).clusters]


def warn(context: Context, stage: str, messages: Iterable[str]) -> None:
    """Emit a warning event per message."""
    for message in messages:
        context.emit(Event("warning", stage, data={"message": message}))


def device_of(pool: Pool) -> str:
    """The torch device of a pool's workers."""
    return "cuda" if pool.gpu else "cpu"
