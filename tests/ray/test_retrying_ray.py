"""What follows when memory runs out or a loss is not a number, on real workers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from failing_jobs import OnASmallDevice, make_job, spoil

from moedisco_ray.artifacts import read_json
from moedisco_ray.config import LowMemoryPool
from moedisco_ray.errors import TrainingError
from moedisco_ray.events import Event
from moedisco_ray.on_ray.trainers import train_all
from moedisco_ray.shell import Placement
from moedisco_ray.training import World, train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

PLACEMENT = Placement(LowMemoryPool(), workers=1, max_failures=0)
STEPS = 12


def test_out_of_memory_halves_the_micro_batch_and_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    roomy = train(make_job(tmp_path / "roomy", STEPS), World(), lambda event: None, lambda: False)
    job = make_job(tmp_path / "small", STEPS, OnASmallDevice, micro_batch=4)
    events: list[Event] = []
    [trained] = train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    [restart] = [event.data for event in events if event.type == "worker_restarted"]
    assert restart["kind"] == "out_of_memory"
    assert "out of memory" in restart["reason"]
    assert read_json(job.checkpoints.parent / "history.json") | {"micro_batch": 2, "failures": 0} == read_json(
        job.checkpoints.parent / "history.json")
    assert trained.result.restored_step == 5
    assert trained.result.losses[:5] == roomy.losses[:5]
    assert trained.result.losses == pytest.approx(roomy.losses, rel=1e-5)


def test_a_poisoned_batch_is_left_out_once_and_reported(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, STEPS)
    spoil(job, step=7)
    events: list[Event] = []
    [trained] = train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    [restart] = [event.data for event in events if event.type == "worker_restarted"]
    assert restart["kind"] == "not_finite"
    assert restart["step"] == 7
    assert "step 8 is nan" in restart["reason"]
    assert trained.result.restored_step == 5
    assert len(trained.result.losses) == STEPS
    # One batch before it and one behind it are left out as well.
    assert read_json(job.checkpoints.parent / "history.json")["skip"] == {"start": 6, "width": 3}
    told = [event.data["step"] for event in events if event.type == "progress"]
    assert [(a, b) for a, b in pairwise(told) if b != a + 1] == [(7, 6)]


def test_what_is_poisoned_twice_is_given_up(ray_cluster: None, tmp_path: Path) -> None:
    job = make_job(tmp_path, STEPS)
    for step in (7, 11):
        spoil(job, step)
    events: list[Event] = []
    with pytest.raises(TrainingError, match=r"submodel-0: poisoned: it went back .* and yet at step 8"):
        train_all([job], PLACEMENT, tmp_path / "ray", events.append)
    assert [event.data["kind"] for event in events if event.type == "worker_restarted"] == ["not_finite"]
