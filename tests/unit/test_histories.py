"""What an end does to a job's files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.locations import Location
from moedisco_ray.execution.ray import card_check
from moedisco_ray.execution.ray.card_memory import fitted, fitted_to_card, memory_of
from moedisco_ray.execution.ray.histories import adjusted, changes_in_words, follow, remembered
from moedisco_ray.models import hf_config
from moedisco_ray.plan import GIB
from moedisco_ray.policies.retrying import Again, End, EndKind, GiveUp, GoBack, History
from moedisco_ray.training import TrainJob, World
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


@pytest.fixture
def large(job: TrainJob, tmp_path: Path) -> TrainJob:
    """A sub-model of 1.2 billion parameters."""
    sizes = Architecture(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        moe_intermediate_size=1024,
        num_experts=8,
        num_experts_per_tok=4,
    )
    hf_config("qwen3_moe", sizes, 32_000, 1024, 0).to_json_file(tmp_path / "config.json")
    recipe = Optimizer(batch_tokens=32 * 1024, micro_batch=4, precision="bf16")
    return dataclasses.replace(job, checkpoints=tmp_path / "steps", sequence_length=1024, optimizer=recipe)


def attempts(job: TrainJob, real_gb: float) -> list[str]:
    """What a training says of its restarts: it fits the card by the plan, and there is room for `real_gb` only."""
    needs, words, history = memory_of(job, 1), list[str](), remembered(job, 1)
    card_gb = planned_gb(job) + 0.3
    while needs(adjusted(job, history).optimizer).total > real_gb * GIB:
        decision = follow(job, history, End("out_of_memory", 0, "CUDA out of memory"), 3, 1, card_gb)
        assert isinstance(decision, Again)
        words.append(changes_in_words(history, decision.history))
        history = decision.history
        assert remembered(job, 1) == history
    return words


def planned_gb(job: TrainJob, **changes: Any) -> float:
    return memory_of(job, 1)(job.optimizer.model_copy(update=changes)).total / GIB


def test_out_of_memory_is_planned_again_once_with_all_levers(large: TrainJob, tmp_path: Path) -> None:
    """Before: micro_batch=2, 1, then recomputation, then the end: three attempts for a card that lacks 7 %."""
    [words] = attempts(large, 0.93 * planned_gb(large))
    assert words == "; it continues with micro_batch=2"
    # Weights, gradients and moments alone do not leave this card enough.
    tight = dataclasses.replace(
        large, output=tmp_path / "tight" / "out", optimizer=large.optimizer.model_copy(update={"micro_batch": 1})
    )
    [words] = attempts(tight, 0.93 * planned_gb(tight))
    assert words == "; it continues with moments=fp8"


def test_a_checkpoint_of_the_optimizers_state_fixes_how_it_is_stored(
    large: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "steps", storage([50]))
    tight = dataclasses.replace(large, optimizer=large.optimizer.model_copy(update={"micro_batch": 1}))
    [words] = attempts(tight, planned_gb(tight, gradient_checkpointing=True))
    assert words == "; it continues with gradient_checkpointing=true"


@pytest.mark.parametrize("share", [0.99, 0.93, 0.8, 0.6])
def test_what_a_smaller_card_can_train_it_trains(large: TrainJob, share: float) -> None:
    least = planned_gb(large, micro_batch=1, gradient_checkpointing=True, moments="fp8", offload_moments=True)
    words = attempts(large, max(least, share * planned_gb(large)))
    assert 0 < len(words) <= 5


def test_after_out_of_memory_on_a_smaller_card_the_settings_are_not_those_that_ran(large: TrainJob) -> None:
    """The worker had fitted them to its card. Before: it was planned again to what it had been fitted to."""
    card_gb = planned_gb(large) - 0.5
    ran = fitted(large, World(), card_gb).optimizer.micro_batch
    decision = follow(large, remembered(large, 1), End("out_of_memory", 0, "CUDA out of memory"), 3, 1, card_gb)
    assert isinstance(decision, Again)
    assert (ran, decision.history.micro_batch) == (2, 1)


def test_settings_of_the_users_stay(large: TrainJob) -> None:
    fixed = {"moments": "full", "offload_moments": False, "gradient_checkpointing": False, "micro_batch": 1}
    pinned = dataclasses.replace(large, optimizer=large.optimizer.model_copy(update=fixed))
    decision = follow(pinned, remembered(pinned, 1), End("out_of_memory", 0, "CUDA out of memory"), 3, 1, 33)
    assert isinstance(decision, GiveUp)


def test_a_card_with_less_free_memory_than_planned_gets_smaller_micro_batches_first(large: TrainJob) -> None:
    """Before: the training began with the planned settings, and ran out of memory."""
    assert fitted(large, World(), planned_gb(large)) is large
    smaller = fitted(large, World(), planned_gb(large) - 0.5)
    assert smaller.optimizer == large.optimizer.model_copy(update={"micro_batch": 2})
    least = planned_gb(large, micro_batch=1, gradient_checkpointing=True)
    assert fitted(large, World(), least).optimizer.gradient_checkpointing is True
    assert fitted(large, World(), least - 1).optimizer == large.optimizer


def test_a_card_that_others_use_is_named_with_what_it_has_left(
    large: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser holds 2 GiB; what the process itself holds, and 1 GiB of CUDA's own, count as free."""
    total = round(planned_gb(large) * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (total - 4 * GIB, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: GIB)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA GeForce RTX 4090")
    events = list[Event]()
    found, card_gb = fitted_to_card(large, World(device="cuda:0"), events.append)
    assert card_gb == pytest.approx(planned_gb(large) - 2, abs=0.01)
    assert found.optimizer == large.optimizer.model_copy(update={"micro_batch": 2})
    [message] = [event.data["message"] for event in events]
    left = planned_gb(large) - 2
    assert message == (
        f"submodel-0: NVIDIA GeForce RTX 4090 has {left:.1f} GiB for it, less than planned; it trains with "
        "optimizer.micro_batch=2"
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (total - GIB, total))
    assert fitted_to_card(large, World(device="cuda:0"), events.append)[0] is large
    assert len(events) == 1


@pytest.mark.parametrize("given", [None, "max_split_size_mb:128"])
def test_memory_segments_grow_unless_the_user_set_the_allocator(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in card_check.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    monkeypatch.setattr(card_check, "failure", lambda *_arguments: None)
    monkeypatch.setattr("ray.get_gpu_ids", list)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that the variable is removed after the test
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    card_check.check_card("pools.low_memory.gpu")
    assert os.environ.get("PYTORCH_ALLOC_CONF") == (None if given else "expandable_segments:True")


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
