"""Batches are read while the step before is computed, and nothing else changes: neither bits nor errors nor stops."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_training import BATCH, RECIPE, L, ignore, never, stop_after, variant, weights, write_shard, write_tiny

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.models import check_same
from moedisco_ray.packed_tokens import TokenStream, batch_indices
from moedisco_ray.policies.retrying import Skip
from moedisco_ray.training import TrainJob, World, train
from moedisco_ray.training.batches import Batches

STEPS, BROKEN = 6, 3


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    torch.set_num_threads(1)
    write_shard(tmp_path / "shard")
    write_tiny(tmp_path / "dense", 1)
    return TrainJob(
        stage="submodels",
        name="submodel-0",
        model=tmp_path / "dense",
        packed_dirs=(tmp_path / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=STEPS,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=2,
        seed=5,
    )


def windows_of(job: TrainJob, step: int) -> list[int]:
    windows = len(TokenStream(job.packed_dirs, L))
    return batch_indices(job.seed, step, BATCH, windows).tolist()


@pytest.mark.parametrize("skip", [None, Skip(2, 3)])
@pytest.mark.parametrize("steps", [range(STEPS), (4, 5), (2, 4, 0)])
def test_a_step_gets_its_own_sequences_wherever_training_begins(
    job: TrainJob, skip: Skip | None, steps: range | tuple[int, ...]
) -> None:
    stream = TokenStream(job.packed_dirs, L)
    with Batches(variant(job, "read", skip=skip), World()) as batches:
        for step in steps:
            [found] = batches(step)
            chosen = windows_of(job, step if skip is None else skip.batch(step))
            windows = torch.from_numpy(np.stack([stream.window(i) for i in chosen]))
            assert torch.equal(found.inputs_BL, windows[:, :-1])
            assert torch.equal(found.targets_BL, windows[:, 1:])


def test_the_next_step_is_read_while_a_step_is_computed_and_none_after_the_last(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before: a step read its own sequences, and the card stood still meanwhile."""
    read, plain, last = list[int](), TokenStream.window, threading.Event()

    def window(stream: TokenStream, i: int) -> NDArray[np.int64]:
        read.append(i)
        if len(read) == 2 * BATCH:
            last.set()
        return plain(stream, i)

    monkeypatch.setattr(TokenStream, "window", window)
    with Batches(variant(job, "ahead", steps=2), World()) as batches:
        next(batches(0))
        assert last.wait(timeout=10)
        next(batches(1))
    assert read == windows_of(job, 0) + windows_of(job, 1)


def test_a_batch_that_cannot_be_read_fails_its_own_step_and_a_stop_before_it_loses_none(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(variant(job, "whole"), World(), ignore, never)
    broken, plain, begun = set(windows_of(job, BROKEN)), TokenStream.window, list[int]()

    def window(stream: TokenStream, i: int) -> NDArray[np.int64]:
        if i in broken:
            raise CorpusError("window", i, "cannot be read")
        return plain(stream, i)

    def on_step(step: int | None) -> None:
        if step is not None:
            begun.append(step)

    with monkeypatch.context() as patch:
        patch.setattr(TokenStream, "window", window)
        assert not set(range(BROKEN)) & {step for step in range(STEPS) if broken & set(windows_of(job, step))}
        stopped = train(job, World(), ignore, stop_after(BROKEN), on_step)
        assert (stopped.finished, stopped.steps) == (False, BROKEN)
        with pytest.raises(CorpusError, match="cannot be read"):
            train(job, World(), ignore, never, on_step)
    assert begun == [*range(BROKEN), BROKEN]
    assert not [each for each in threading.enumerate() if each.name.startswith("batches")]
    assert train(job, World(), ignore, never).losses == whole.losses
    check_same(weights(job.output), weights(job.output.with_name("whole-out")))
