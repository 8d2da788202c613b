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
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray import causes
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.execution.ray.ray_train_internals import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from moedisco_ray.execution.ray.unit_status import UnitStatus
from moedisco_ray.policies.retrying import Skip

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PLACEMENT = Placement(LowMemoryPool(), workers=1, max_failures=0)
STEPS = 12


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_batch_with_a_nan_loss_or_an_error_that_comes_back_is_left_out_and_reported(
    ray_cluster: None, tmp_path: Path
) -> None:
    """The error has its step though none was reported, and its batch is left out after it came a second time."""
    nan, error = make_job(tmp_path / "nan", STEPS), make_job(tmp_path / "error", STEPS)
    error = dataclasses.replace(error, name="submodel-1", log_every=100)
    spoil(nan, step=7)
    spoil(error, 7, UNKNOWN)
    events: list[Event] = []
    placement = dataclasses.replace(PLACEMENT, max_failures=3)
    trained = train_all([nan, error], placement, tmp_path / "ray", events.append)
    restarts = [(event.unit, event.data) for event in events if event.type == "worker_restarted"]
    [of_nan] = [data for unit, data in restarts if unit == nan.name]
    assert (of_nan["kind"], of_nan["step"]) == ("not_finite", 7)
    assert "step 8 is nan" in of_nan["reason"]
    of_error = [data for unit, data in restarts if unit == error.name]
    assert [(data["kind"], data["step"]) for data in of_error] == [("failed", 7)] * 2
    # One batch before it and one behind it are left out as well.
    spared = here(dataclasses.replace(make_job(tmp_path / "spared", STEPS), skip=Skip(start=6, width=3)))
    assert [each.result.restored_step for each in trained] == [5, 5]
    assert [each.result.losses for each in trained] == [spared.losses] * 2


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
