"""What an end does to a job's files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.store.locations import Location
from moedisco_ray.execution.ray.histories import adjusted, changes_in_words, follow, remembered
from moedisco_ray.policies.retrying import Again, End, EndKind, GoBack, History
from moedisco_ray.training import TrainJob
from moedisco_ray.training.checkpoints import checkpoint


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="submodels",
        name="submodel-0",
        model=tmp_path,
        packed_dirs=(),
        output=tmp_path / "home" / "out",
        checkpoints="s3://bucket/steps",
        steps=200,
        sequence_length=1,
        optimizer=Optimizer(batch_tokens=8),
        checkpoint_every=1,
    )


def storage(found: list[int] | StorageError) -> Callable[[Location], list[int]]:
    def steps(_location: Location) -> list[int]:
        if isinstance(found, StorageError):
            raise found
        return found

    return steps


@pytest.mark.parametrize("kind", ["preempted", "died", "storage", "out_of_memory", "failed", "not_finite"])
def test_a_storage_that_is_away_when_workers_end_does_not_end_the_run(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, kind: EndKind
) -> None:
    monkeypatch.setattr(checkpoint, "steps", storage(StorageError("it does not answer")))
    decision = follow(job, History(8, step=5, at_step=1), End(kind, 5, "its end"), 3, 1)
    assert isinstance(decision, Again)
    assert remembered(job, 1) == decision.history


@pytest.mark.parametrize(("given", "recomputes"), [(None, True), (False, False)])
def test_out_of_memory_takes_the_next_lever_that_the_configuration_leaves_open(
    job: TrainJob, given: bool | None, recomputes: bool
) -> None:
    """Before (a0c02aba): GiveUp, `one sequence does not fit into the worker's memory`, at a micro-batch of 1."""
    recipe = job.optimizer.model_copy(update={"gradient_checkpointing": given, "micro_batch": 2})
    job = dataclasses.replace(job, optimizer=recipe)
    end, words, history = End("out_of_memory", 5, "CUDA out of memory"), list[str](), remembered(job, 1)
    while isinstance(decision := follow(job, history, end, 3, 1), Again):
        words.append(changes_in_words(history, decision.history))
        history = decision.history
    assert remembered(job, 1) == history
    last = "; it continues with gradient_checkpointing=true"
    assert words == ["; it continues with micro_batch=1", *([last] if recomputes else [])]
    assert adjusted(job, history).optimizer.gradient_checkpointing is (True if recomputes else given)


def test_going_back_drops_the_checkpoints_after_the_one_it_goes_back_to(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(checkpoint, "steps", storage([80, 90, 100]))
    monkeypatch.setattr(checkpoint, "discard_after", lambda _location, step: dropped.append(step))
    decision = follow(job, History(8), End("not_finite", 101, "nan"), 3, 1)
    assert isinstance(decision, GoBack)
    assert dropped == [decision.checkpoint] == [90]
    assert remembered(job, 1) == decision.history
