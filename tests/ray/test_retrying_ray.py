"""What follows when memory runs out or a loss is not a number, on real workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import failing_jobs
import pytest
from failing_jobs import UNKNOWN, OnASmallDevice, here, make_job, spoil
from ray import cloudpickle
from ray.train import ControllerError

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool
from moedisco_ray.core.errors import TrainingError
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import causes
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.execution.ray.ray_train_internals import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.retrying import Skip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PLACEMENT = Placement(LowMemoryPool(), workers=1, max_failures=0)
STEPS = 12


def test_out_of_memory_halves_the_micro_batch_and_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    roomy = here(make_job(tmp_path / "roomy", STEPS))
    job = make_job(tmp_path / "small", STEPS, OnASmallDevice, micro_batch=4)
    cloudpickle.register_pickle_by_value(failing_jobs)  # workers cannot import it
    events: list[Event] = []
    [trained] = train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    [restart] = [event.data for event in events if event.type == "worker_restarted"]
    assert restart["kind"] == "out_of_memory"
    assert "out of memory" in restart["reason"]
    restored = trained.result.restored_step
    assert restored in (5, 10)  # the first checkpoint is complete some steps after it began
    assert trained.result.losses[:restored] == roomy.losses[:restored]
    assert trained.result.losses == pytest.approx(roomy.losses, rel=1e-5)


def test_a_batch_with_a_nan_loss_is_left_out_once_and_reported(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, STEPS)
    spoil(job, step=7)
    events: list[Event] = []
    [trained] = train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    [restart] = [event.data for event in events if event.type == "worker_restarted"]
    assert restart["kind"] == "not_finite"
    assert restart["step"] == 7
    assert "step 8 is nan" in restart["reason"]
    assert trained.result.restored_step == 5
    # One batch before it and one behind it are left out as well.
    spared = dataclasses.replace(make_job(tmp_path / "spared", STEPS), skip=Skip(start=6, width=3))
    assert trained.result.losses == here(spared).losses


# the first time is as in the test before, and what follows from a second one is a pure function's decision
@pytest.mark.slow
def test_what_diverges_twice_is_given_up(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, STEPS)
    for step in (7, 11):
        spoil(job, step)
    events: list[Event] = []
    with pytest.raises(TrainingError, match=r"submodel-0: diverged at step 8 after it went back .* nan"):
        train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    assert [event.data["kind"] for event in events if event.type == "worker_restarted"] == ["not_finite"]


@pytest.mark.chaos
def test_an_error_has_its_step_though_none_was_told_of_and_two_at_one_step_go_back(
    ray_cluster: None, tmp_path: Path
) -> None:
    job = dataclasses.replace(make_job(tmp_path, STEPS), log_every=100)
    spoil(job, 7, UNKNOWN)
    events: list[Event] = []
    [trained] = train_all([job], dataclasses.replace(PLACEMENT, max_failures=3), tmp_path / "ray", events.append)
    restarts = [event.data for event in events if event.type == "worker_restarted"]
    assert [(restart["kind"], restart["step"]) for restart in restarts] == [("failed", 7)] * 2
    assert trained.result.restored_step == 5
    spared = dataclasses.replace(make_job(tmp_path / "spared", STEPS), skip=Skip(start=6, width=3))
    assert trained.result.losses == here(spared).losses


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (WorkerGroupStartupTimeoutError(1), "preempted"),
        (WorkerGroupStartupFailedError("its worker's process died"), "died"),
    ],
)
def test_workers_that_cannot_start_are_failures_unless_their_slots_or_a_node_went(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: str
) -> None:
    monkeypatch.setattr(causes, "NODE_DEATH_SECONDS", 0.5)
    assert causes.end_of(causes.failures_of(ControllerError(failure)), UnitStatus(), causes.dead_nodes()).kind == kind
