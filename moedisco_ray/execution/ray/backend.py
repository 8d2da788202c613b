"""The backend that runs a run's work on the connected Ray cluster."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

from moedisco_ray.backend import Placement, Trained, of_whole_moe
from moedisco_ray.core.config import AnyPool, HighMemoryPool, Pool, RunConfig
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.stages import OF_CLUSTERS
from moedisco_ray.core.stop_file import NEVER, StopFile
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.attempts import AttemptContext
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.boxes import MOST_AT_ONCE
from moedisco_ray.execution.ray.clustering import build_clusters
from moedisco_ray.execution.ray.corpus import build_corpus
from moedisco_ray.execution.ray.event_mailbox import RunMailbox, end_mailbox, open_mailbox, run_mailbox
from moedisco_ray.execution.ray.gang import GangSize
from moedisco_ray.execution.ray.named_actors import mailbox_name
from moedisco_ray.execution.ray.new_cards import examine_new_cards
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.execution.ray.queue import Queue
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.tasks import Slot
from moedisco_ray.execution.submodel_progress import SubmodelProgress
from moedisco_ray.policies.arrival import ends_in
from moedisco_ray.policies.gang import Sizes
from moedisco_ray.policies.quorum import ALL, Quorum
from moedisco_ray.training import TrainJob

P = ParamSpec("P")
T = TypeVar("T")

_LOGGED = 2 * MOST_AT_ONCE
"""Number of stored events to compare with those that seats have sent: more than a driver stores before it says so."""
_NO_SLOT_SHARE = 0.02
"""Part of a slot that a function holds which runs next to the slots."""

Observer = Callable[[Sequence[float], Sequence[float], int, float], None]
"""Called at each poll with the seconds left of each running training and of each waiting one, the number of slots for
trainings, and the factor by which lost nodes and checkpoints lengthen the remaining time."""


class RayBackend:
    """A `backend.Backend` on the connected Ray cluster. The run's name is the prefix of every name that Ray shows.

    Args:
        config: The run's configuration.
        namespace: Ray namespace of the run's actors. A later driver with the same one finds the seats that this one
            leaves behind if it dies. None for a new one.
        stop: File that, once it exists, ends the seats of a driver that has died, too.
        logged: The events that an earlier driver of the run has stored.
    """

    def __init__(
        self, config: RunConfig, namespace: str | None = None, stop: StopFile = NEVER, logged: Sequence[Event] = ()
    ) -> None:
        self._run = config.name
        namespace = namespace or f"moedisco-{uuid.uuid4().hex}"
        self._mailbox, under_way = run_mailbox(mailbox_name(self._run), namespace, stop, logged[-_LOGGED:])
        self._high = config.pools.high_memory
        # If both pools share a tag, reserving slots for the gang would starve the sub-models that the gang waits for.
        self._reserves = config.finetune_pool is self._high and self._high.resource not in config.pools.low_memory.tags
        self._seats = Seats(self._run, mailbox=self._mailbox, under_way=under_way)
        self._reservation = Reservation(self._high, f"{config.name}-ahead", aside=self._seats.aside)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:  # if this fails, the seats of an earlier driver keep their mailbox
            stack.enter_context(self._mailbox.renewed())
            self._seats.__enter__()
            self._renewal = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._renewal:
            try:
                self._seats.__exit__(*error)
            finally:  # a seat that could not be ended ends when the mailbox has
                if not self._mailbox.taken_over.is_set():
                    end_mailbox(self._mailbox.handle)

    def idle_seats(self, tag: str) -> int:
        """Number of slots with a tag that this run's idle seats hold now."""
        return self._seats.idle(tag)

    def examine_new_cards(self, config: RunConfig, emit: Emit, store: RunStore) -> None:
        """Look at the cards of the run; see `new_cards`.

        An earlier driver whose seats are at work has looked at them, and the seats must not end for it.
        """
        if not self._seats.has_under_way:
            examine_new_cards(config, self._seats, emit, store)

    def build_corpus(self, config: RunConfig, directory: Path, emit: Emit) -> dict[str, Any]:
        """Build the corpus with Ray Data over the sources' files."""
        return build_corpus(config, directory, emit=emit, mailbox=self._mailbox)

    def build_clusters(
        self,
        config: RunConfig,
        *,
        corpus_dir: Path,
        model: Path,
        directory: Path,
        emit: Emit,
        stop: StopFile,
        store: RunStore,
    ) -> dict[str, Any]:
        """Build the clusters of documents; seats compute the document vectors."""
        return build_clusters(
            config,
            corpus_dir=corpus_dir,
            model_dir=model,
            directory=directory,
            emit=emit,
            stop=stop,
            seats=self._seats,
            store=store,
            mailbox=self._mailbox,
        )

    def call(
        self, pool: Pool | None, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function on a seat of the pool, or in a Ray task if it needs no pool."""
        if not isinstance(pool, HighMemoryPool):
            return Slot(pool, emit, stop, self._seats).run(function, *args, **kwargs)

        # Keep the other nodes of the coming gang, which an autoscaler would remove because they are idle meanwhile.
        # Request them only once the function holds its slot: two runs that each hold a part would wait for each other
        # forever.
        rest = max(0, self._reservation.workers - 1)

        def reserve_rest(event: Event) -> None:
            if event.type == "workers_held":
                self._reservation.record()
                self._reservation.request(rest)
            emit(event)

        self._reservation.hand_over()
        self._seats.end_idle_of_other_pools(pool)
        return Slot(pool, reserve_rest, stop, self._seats).run(function, *args, **kwargs)

    def call_without_slot(
        self, pool: Pool, emit: Emit, stop: StopFile, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call a function in a Ray task next to the slots of the pool's nodes, without CPUs, which they may lack."""
        return Slot(None, emit, stop, self._seats, free_bundle={pool.resource: _NO_SLOT_SHARE}).run(
            function, *args, **kwargs
        )

    @contextlib.contextmanager
    def reachable(self, emit: Emit) -> Iterator[Emit]:
        """Yield an `emit` that workers may call: a mailbox actor passes their events to `emit` until the block ends."""
        with open_mailbox(emit, self._mailbox, uuid.uuid4().hex) as mailbox:
            yield mailbox.emitter

    def train_all(
        self,
        jobs: Sequence[TrainJob],
        placement: Placement,
        directory: Path,
        emit: Emit,
        *,
        stop: StopFile = NEVER,
        quorum: Quorum = ALL,
    ) -> list[Trained]:
        """Train each job on a seat; while the last jobs train, request the nodes of the next stage."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._reservation.request, 0)
            trained = train_all(
                jobs,
                placement,
                directory,
                emit,
                stop=stop,
                quorum=quorum,
                run=self._run,
                seats=self._seats,
                observer=self._observer(jobs[0].stage, emit),
                mailbox=self._mailbox,
            )
            on_failure.pop_all()
        return trained

    def train_gang(
        self, job: TrainJob, pool: AnyPool, max_failures: int, directory: Path, emit: Emit, *, stop: StopFile = NEVER
    ) -> Trained:
        """Train a job in consecutive Ray Train runs, as large as slots allow; one worker trains on a seat.

        A training that streams its weights has one worker, whose seat holds all slots of the pool on one node.
        """
        pool = of_whole_moe(pool)
        if pool.most_workers == pool.slots:
            self._reservation.hand_over()
            self._seats.end_idle_of_other_pools(pool)
            if pool.slots > 1:
                with session.freeing(pool.resource, self._seats.idle(pool.resource) if session.autoscales() else 0):
                    self._seats.end_idle(lambda seat: seat.pool.slots != pool.slots)
                    self._seats.end_parked(lambda seat: seat.pool.path == pool.path)
            [trained] = train_all(
                [job],
                Placement(pool, 1, max_failures),
                directory,
                emit,
                stop=stop,
                run=self._run,
                seats=self._seats,
                mailbox=self._mailbox,
            )
            return trained
        self._seats.end_under_way()
        with session.freeing(pool.resource, self._seats.idle(pool.resource) if session.autoscales() else 0):
            self._seats.end_idle()
        # The gang takes over what is reserved for it: a request of its own would be for further nodes.
        reserved = self._reservation if pool is self._high else None
        return train_gang(
            job,
            pool,
            max_failures,
            directory,
            emit,
            stop=stop,
            run=self._run,
            reservation=reserved,
            aside=self._seats.aside,
            mailbox=self._mailbox,
        )

    def _observer(self, stage: str, emit: Emit) -> Observer | None:
        if stage not in OF_CLUSTERS or not self._reserves or not session.autoscales():
            return None
        pool = self._high
        # Clamp to the autoscaler's maximum: a larger gang is never scheduled.
        workers = max(pool.fewest_workers, int(min(pool.most_workers, session.max_slots(pool))))

        def observe(running: Sequence[float], waiting: Sequence[float], slots: int, stretch: float) -> None:
            advice = self._reservation.prepare(running, waiting, slots, workers, stretch)
            if advice == "ask":
                seconds = ends_in(running, waiting, slots, stretch)
                emit(
                    Event(
                        "nodes_asked", stage, data={"pool": pool.key, "workers": workers, "seconds": round(seconds, 1)}
                    )
                )
            elif advice == "release":
                emit(Event("nodes_let_go", stage, data={"pool": pool.key}))

        return observe


def train_all(
    jobs: Sequence[TrainJob],
    placement: Placement,
    directory: Path,
    emit: Emit,
    *,
    stop: StopFile = NEVER,
    quorum: Quorum = ALL,
    run: str = "run",
    seats: Seats | None = None,
    observer: Observer | None = None,
    gang: GangSize | None = None,
    mailbox: RunMailbox | None = None,
) -> list[Trained]:
    """Train all jobs, in parallel as far as the pool has slots; waiting jobs hold no slots.

    Args:
        jobs: The trainings; the results are in the same order.
        placement: Pool and number of the workers.
        directory: Directory for the stop files of the trainers and for the stored progress of the jobs.
        emit: Receives the workers' events.
        stop: Stop file; once it exists, the trainers save checkpoints and end.
        quorum: Number of jobs that must finish, and how long to wait for the others.
        run: Prefix for the names of the Ray Train runs.
        seats: The run's seats (warm processes that hold slots); None if new seats are to be started for these
            trainings.
        observer: Called at every poll; see `Observer`.
        gang: Decides the number of workers, if `jobs` is one job that trains as a gang. None if each job trains with
            one worker, on a seat.
        mailbox: The run's mailbox; None to start one.

    Raises:
        MoeDiscoError: A job failed with an error of this package that no retry repairs, such as a full disk.
        OSError: An event could not be written.
        PoolError: A job fits no node type of a mixed pool, or torch can use no GPU of the pool (`CardError`).
        TrainingError: Too many trainings failed or diverged to reach the quorum.
        RunStopped: The run was asked to end; the trainers have saved a checkpoint and ended.
        KeyboardInterrupt: The user interrupted the run; the trainers have saved a checkpoint and ended.
    """
    directory.mkdir(parents=True, exist_ok=True)
    end = StopFile(directory / f"stop-{uuid.uuid4().hex}")
    progress = SubmodelProgress(jobs, quorum, placement.workers, directory / "submodel_progress.json")
    with (
        contextlib.ExitStack() as stack,
        open_mailbox(emit, mailbox) as opened,
        ThreadPoolExecutor(len(jobs) + 1, thread_name_prefix="trainer") as threads,
    ):
        if gang is None:
            seats = seats or stack.enter_context(Seats(run))
            aside = seats.aside
        else:
            seats, aside = None, gang.aside
        context = AttemptContext(
            run=run,
            placement=placement,
            directory=directory,
            stop_files=(stop, end),
            mailbox=opened,
            seats=seats,
            aside=aside,
        )
        queue = Queue(jobs, context, threads, progress, gang)
        try:
            queue.resume()
            while queue.should_wait:
                stop.check()
                opened.check()
                queue.start()
                if observer is not None:
                    observer(*queue.seconds_left, aside.room(placement.pool), queue.stretch)
                queue.poll()
            end.request("enough")
            queue.leave_unfinished()
        finally:
            # However the queue ends, stop its trainers with a checkpoint before the executor waits for them. They train
            # on if another driver has taken over the run.
            if mailbox is None or not mailbox.taken_over.is_set():
                end.request("ended")
                queue.wait_for_ends()
        return queue.results


def train_gang(
    job: TrainJob,
    pool: AnyPool,
    max_failures: int,
    directory: Path,
    emit: Emit,
    *,
    stop: StopFile = NEVER,
    run: str = "run",
    reservation: Reservation | None = None,
    aside: NodesAside | None = None,
    mailbox: RunMailbox | None = None,
) -> Trained:
    """Train one job as a gang, with as many workers as the pool has slots for, within the pool's bounds.

    Args:
        job: The training.
        pool: Pool of the workers, with the bounds on their number.
        max_failures: Maximum number of restarts after failures of workers. A lost machine or a change of size is not a
            failure.
        directory: As in `train_all`.
        emit: Receives the workers' events.
        stop: Stop file; once it exists, the workers save a checkpoint and end.
        run: Prefix for the names that Ray shows.
        reservation: Slots that an earlier stage has requested for the gang; None if no slots have been requested.
        aside: Nodes that the run leaves out; None if none is known yet.
        mailbox: The run's mailbox; None to start one.

    Raises:
        MoeDiscoError: As in `train_all`.
    """
    sizes = Sizes(job.batch, pool.fewest_workers, pool.most_workers)
    placement = Placement(pool, sizes.fewest, max_failures)
    reservation = reservation or Reservation(pool, f"{run}-{job.name}-ahead")
    gang = GangSize(placement, sizes, reservation, aside=aside)
    [trained] = train_all([job], placement, directory, emit, stop=stop, run=run, gang=gang, mailbox=mailbox)
    return trained
