"""How an attempt ended, from made-up errors of Ray Train."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    OwnerDiedError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool, Optimizer
from moedisco_ray.core.errors import MoeDiscoError, PoolError, RunDirError, StorageError
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import attempts, causes, worker
from moedisco_ray.execution.ray.attempts import AttemptContext, attempt
from moedisco_ray.execution.ray.causes import end_of, failures_of, last_line
from moedisco_ray.execution.ray.event_mailbox import EventMailbox, RunMailbox
from moedisco_ray.execution.ray.mailbox_actor import MailboxActor
from moedisco_ray.execution.ray.ray_train_internals import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.retrying import End
from moedisco_ray.training import TrainJob, TrainResult

ALONE = WorkerGroupError("", {1: RuntimeError("gloo: timed out waiting for the others")})
BUG = (
    '  File "/srv/preempt/loop.py", line 7, in step\n    step(job)  # out of memory: the node has died\nValueError: bug'
)
FINISHED = TrainResult(4, 4, (), 1.0, 0, finished=True)


def progress(step: int) -> Event:
    """Progress at half a second per step."""
    return Event("progress", "finetune", "finetune", {"step": step, "tokens": step, "tokens_per_second": 2.0})


class Mail(EventMailbox):
    """Mailbox of a unit with a given outcome."""

    def __init__(self, outcome: object) -> None:
        super().__init__(RunMailbox(None), check=lambda: None)
        self._outcome = outcome

    def begin_attempt(self, unit: str) -> str:
        return "this"

    def kill_attempt(self, unit: str) -> None:
        pass

    def count_loss(self) -> None:
        pass

    def end_attempt(self, unit: str) -> None:
        pass

    def outcome(self, unit: str) -> Any:
        if isinstance(self._outcome, MoeDiscoError):
            raise self._outcome
        return self._outcome

    def status(self, unit: str) -> UnitStatus:
        return UnitStatus(("node",), 3)


def end_after(error: TrainingFailedError, status: UnitStatus, dead_before: Collection[str] = ()) -> End:
    return end_of(failures_of(error), status, dead_before)


def of_task(cause: Exception) -> RayTaskError:
    return RayTaskError("step", BUG, cause, proctitle="ray::step", pid=1, ip="10.0.0.7").as_instanceof_cause()


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live node and a dead one, with no time to wait for Ray to notice."""
    monkeypatch.setattr(causes, "NODE_DEATH_SECONDS", 0.0)
    monkeypatch.setattr(
        causes.ray, "nodes", lambda: [{"NodeID": "node", "Alive": True}, {"NodeID": "gone", "Alive": False}]
    )


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception | None, object], TrainResult | End]:
    """Runs an attempt with a given error of Ray Train and a given outcome of its worker."""
    job = TrainJob(
        stage="finetune",
        name="finetune",
        model=tmp_path,
        packed_dirs=(),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=4,
        sequence_length=1,
        optimizer=Optimizer(batch_tokens=1),
        checkpoint_every=1,
    )

    def fits(error: Exception | None, outcome: object) -> TrainResult | End:
        class Trainer:
            def __init__(self, *args: object, **settings: object) -> None:
                pass

            def fit(self) -> None:
                if error is not None:
                    raise error

        monkeypatch.setattr(attempts, "TorchTrainer", Trainer)
        return attempt(
            job,
            AttemptContext(
                run="run",
                placement=Placement(LowMemoryPool(), 2, 0),
                directory=tmp_path,
                stop_files=(),
                mailbox=Mail(outcome),
            ),
        )

    return fits


def test_a_worker_s_own_words_go_before_what_the_others_died_of(fits: Callable[..., TrainResult | End]) -> None:
    with pytest.raises(RunDirError, match="disk"):
        fits(ALONE, RunDirError("output", "/run", "the disk is full"))
    assert fits(ALONE, StorageError("s3://bucket does not answer")) == End("storage", 3, "s3://bucket does not answer")
    assert fits(ALONE, FINISHED) == FINISHED
    assert fits(None, FINISHED) == FINISHED


def test_without_a_word_it_is_what_ray_says(fits: Callable[..., TrainResult | End]) -> None:
    assert fits(ALONE, None) == End("failed", 3, "gloo: timed out waiting for the others")
    assert fits(None, None) == End("failed", 3, "its worker ended without a result; see the Ray logs")


def test_a_storage_that_ray_train_cannot_reach_is_tried_again_and_a_full_disk_is_not(
    fits: Callable[..., TrainResult | End], tmp_path: Path
) -> None:
    away = fits(OSError("When creating key: curlCode: 7"), None)
    assert away == End("storage", 3, f"{tmp_path.parent} does not answer (When creating key: curlCode: 7)")
    with pytest.raises(RunDirError, match="disk"):
        fits(OSError(errno.ENOSPC, "No space left on device"), None)


@pytest.mark.parametrize(
    "error",
    [
        ActorUnavailableError("it does not answer", bytes(16)),
        OwnerDiedError("5d", None, ""),
        RuntimeEnvSetupError("no such package"),
        GetTimeoutError("too slow"),
        of_task(KeyError("a callback's")),
    ],
)
def test_a_controller_that_is_out_of_reach_ends_its_own_attempt_alone(
    fits: Callable[..., TrainResult | End], monkeypatch: pytest.MonkeyPatch, error: RayError
) -> None:
    killed: list[str] = []
    monkeypatch.setattr(Mail, "kill_attempt", lambda _mail, unit: killed.append(unit))
    assert fits(error, None) == End("died", 3, f"its controller died: {last_line(error)}")
    assert killed == ["finetune"]  # it may live, and must not run alongside the next one
    assert fits(ALONE, None).kind == "failed"
    assert killed == ["finetune"]


def test_what_cost_work_with_a_machine_or_a_process_is_counted_as_a_loss(
    fits: Callable[..., TrainResult | End], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    monkeypatch.setattr(Mail, "count_loss", lambda _mail: lost.append("one"))
    unannounced = WorkerGroupError("", {0: RuntimeError("the node has died")})
    for error, outcome, counted in (
        (ALONE, None, 0),
        (None, FINISHED, 0),
        (ControllerError(WorkerGroupStartupTimeoutError(1)), None, 0),
        (None, dataclasses.replace(FINISHED, finished=False), 0),
        (unannounced, None, 1),
        (RuntimeEnvSetupError(), None, 2),
    ):
        fits(error, outcome)
        assert len(lost) == counted


def test_words_in_paths_and_source_lines_say_nothing_of_an_end() -> None:
    end = end_after(WorkerGroupError(BUG, {0: of_task(ValueError("bug"))}), UnitStatus(("node",), 3))
    assert end == End("failed", 3, "bug")


def test_a_node_s_end_is_a_preemption_whatever_the_others_say() -> None:
    gone = WorkerHealthCheckFailedError(
        "", NodeDiedError("Task failed because the node it was running on is dead or unavailable.")
    )
    assert (
        end_after(WorkerGroupError("", {0: of_task(ValueError("bug")), 1: gone}), UnitStatus(("node",), 3)).kind
        == "preempted"
    )


def test_slots_that_no_autoscaler_brings_are_not_waited_for(fits: Callable[..., TrainResult | End]) -> None:
    with pytest.raises(
        PoolError, match=r"pools.low_memory.resource: 'low_mem_gpu': the Ray cluster never has 2 of it at once"
    ):
        fits(ControllerError(InsufficientClusterResourcesError("the cluster only has a maximum of 0")), None)


def test_who_finds_no_slot_has_lost_no_work() -> None:
    end = end_after(ControllerError(WorkerGroupStartupTimeoutError(1)), UnitStatus(), {"gone"})
    assert (end.kind, end.saved) == ("preempted", True)
    end = end_after(WorkerGroupError("", {0: RuntimeError("the node has died")}), UnitStatus(), {"gone"})
    assert (end.kind, end.saved) == ("preempted", False)


def test_the_node_of_an_earlier_attempt_excuses_no_later_one() -> None:
    mailbox = MailboxActor()
    mailbox.set_workers("finetune", mailbox.begin_attempt("finetune"), ("gone",))
    assert (
        end_after(WorkerGroupError("", {0: RuntimeError("bug")}), mailbox.statuses(["finetune"])["finetune"]).kind
        == "preempted"
    )
    mailbox.begin_attempt("finetune")
    unstarted = ControllerError(WorkerGroupStartupFailedError("its image lacks a library"))
    assert end_after(unstarted, mailbox.statuses(["finetune"])["finetune"], {"gone"}).kind == "died"


def test_what_fails_before_its_first_step_is_not_where_the_attempt_before_it_was() -> None:
    mailbox = MailboxActor()
    mailbox.push(progress(500), mailbox.begin_attempt("finetune"))
    assert mailbox.statuses(["finetune"])["finetune"] == UnitStatus((), 500, 0.5)
    mailbox.begin_attempt("finetune")
    error = WorkerGroupError("", {0: RuntimeError("its image lacks a library")})
    end = end_after(error, mailbox.statuses(["finetune"])["finetune"])
    assert (end.kind, end.step) == ("failed", None)
    assert mailbox.statuses(["finetune"])["finetune"].step_seconds == 0.5  # which orders the queue


def test_an_error_s_step_is_the_worker_s_word_and_not_the_last_progress() -> None:
    mailbox = MailboxActor()
    this = mailbox.begin_attempt("finetune")
    mailbox.set_exit_step("finetune", this, 0)
    assert (
        end_after(WorkerGroupError("", {0: RuntimeError("bug")}), mailbox.statuses(["finetune"])["finetune"]).step == 0
    )
    this = mailbox.begin_attempt("finetune")
    mailbox.push(progress(500), this)
    assert mailbox.statuses(["finetune"])["finetune"].current_step == 500
    mailbox.set_exit_step("finetune", this, 507)
    mailbox.set_exit_step("finetune", this, 508)  # another of the gang, that lost sight of the first
    assert (
        end_after(WorkerGroupError("", {0: RuntimeError("bug")}), mailbox.statuses(["finetune"])["finetune"]).step
        == 507
    )


def test_a_worker_tells_where_it_was_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, str, int]] = []
    mailbox = SimpleNamespace(set_exit_step=SimpleNamespace(remote=lambda *word: word))
    monkeypatch.setattr(worker.ray, "wait", lambda words, **_limit: sent.extend(words))
    with pytest.raises(ValueError, match="bug"), worker.reporting_exit_step("finetune", mailbox, "this"):
        raise ValueError("bug before the first step")
    assert sent == []
    with pytest.raises(ValueError, match="bug"), worker.reporting_exit_step("finetune", mailbox, "this") as begins:
        for step in (3, 4):
            begins(step)
        raise ValueError("bug")
    assert sent == [("finetune", "this", 4)]
