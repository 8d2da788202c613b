"""The parallel seed: members share one data order, combine all weights, and end with one model, killed or not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sync_group import SyncGroup, leaving
from tiny_training import BATCH, L, ignore, stop_after, weights, write_shard, write_tiny
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import LowMemoryPool, Optimizer, Outer
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import check_same, load_model, specialise
from moedisco_ray.packed_tokens import batch_indices
from moedisco_ray.plan.steps import unit_steps
from moedisco_ray.policies.sync_points import common_sync_steps
from moedisco_ray.training import DataShare, SyncPlan, TrainJob, World
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.sync.files import history

MEMBERS, STEPS, EVERY, SEED = 3, 8, 3, 5
RECIPE = Optimizer(lr=3e-3, batch_tokens=BATCH * L)
OUTER = Outer(lr=0.7, momentum=0.9)
MEAN = Outer(lr=1.0, momentum=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("seed")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "start", 4)
    return home


def members(
    home: Path, directory: Path, *, recipe: Optimizer = RECIPE, every: int = EVERY, outer: Outer = OUTER
) -> list[TrainJob]:
    plan = SyncPlan(directory / "sync", common_sync_steps([STEPS], every)[0], outer, scope="all", ranges=MEMBERS)
    return [
        TrainJob(
            stage="seed",
            name=f"seed-{k}",
            model=home / "start",
            packed_dirs=(home / "shard",),
            output=directory / f"home-{k}" / "trained",
            checkpoints=directory / f"home-{k}" / "steps",
            steps=STEPS,
            sequence_length=L,
            optimizer=recipe,
            checkpoint_every=5,
            seed=SEED,
            log_every=1,
            share=DataShare(k, MEMBERS),
            sync=plan,
            with_optimizer_state=k == 0,
            drop_checkpoints=True,
        )
        for k in range(MEMBERS)
    ]


def in_process(jobs: Sequence[TrainJob], emit: Callable[[Event], None] = ignore) -> list[Trained]:
    return LocalBackend().train_all(jobs, Placement(LowMemoryPool(), 1, 0), Path(), emit)


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TrainJob]:
    jobs = members(home, tmp_path_factory.mktemp("undisturbed"))
    in_process(jobs)
    return jobs


# --- what it computes


@given(
    seed=st.integers(0, 9),
    members=st.integers(1, 5),
    batch=st.integers(1, 6),
    step=st.integers(0, 20),
    windows=st.integers(1, 40),
)
def test_the_members_of_a_step_take_the_batch_of_one_training_with_their_batches_together(
    seed: int, members: int, batch: int, step: int, windows: int
) -> None:
    taken = [batch_indices(seed, DataShare(k, members).batch(step), batch, windows) for k in range(members)]
    assert np.array_equal(np.concatenate(taken), batch_indices(seed, step, members * batch, windows))


@given(batches=st.integers(1, 500), members=st.integers(1, 9))
def test_the_members_take_the_batches_of_a_phase_each_once(batches: int, members: int) -> None:
    steps = unit_steps(batches * RECIPE.batch_tokens, RECIPE, [1] * min(members, batches))
    shares = [DataShare(k, len(steps), sum(steps)) for k in range(len(steps))]
    taken = sorted(share.batch(step) for share, own in zip(shares, steps, strict=True) for step in range(own))
    assert taken == list(range(batches))
    for step in range(steps[0] + 1):
        assert shares[0].taken(step) == sum(min(step, own) for own in steps)


@given(batches=st.integers(1, 500), members=st.integers(1, 9), every=st.integers(1, 600))
def test_sync_points_are_regular_and_the_last_one_is_after_the_last_step(
    batches: int, members: int, every: int
) -> None:
    steps = unit_steps(batches * RECIPE.batch_tokens, RECIPE, [1] * min(members, batches))
    found = common_sync_steps(steps, every)
    assert len({at[:-1] for at in found}) == 1
    for at, own in zip(found, steps, strict=True):
        gaps = [after - before for before, after in itertools.pairwise((0, *at))]
        assert at[-1] == own
        assert gaps[:-1] == [every] * (len(gaps) - 1)
        assert 0 < gaps[-1] <= 2 * every


def plain_adamw(model: PreTrainedModel, _: TrainJob) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": RECIPE.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=RECIPE.lr,
        betas=(0.9, 0.95),
    )


def our_muon(model: PreTrainedModel, job: TrainJob) -> torch.optim.Optimizer:
    """It is written by hand in its own tests; torch's takes no experts in one tensor."""
    return make_optimizer(model, job, World())


def by_hand(
    home: Path, every: int, outer: Outer, inner: Callable[[PreTrainedModel], torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Local training on each member's batches, and DiLoCo's outer step written as in its paper, with plain torch."""
    stream = np.concatenate([np.load(path) for path in sorted((home / "shard").glob("*.npy"))]).astype(np.int64)
    windows = (len(stream) - 1) // L
    start: PreTrainedModel = AutoModelForCausalLM.from_pretrained(home / "start", dtype=torch.float32)
    common = {name: p.detach().clone() for name, p in start.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in common.items()}
    # With the experts' forward of a training: another order of its sums would be rounded otherwise, which AdamW makes
    # larger.
    models = [
        specialise(AutoModelForCausalLM.from_pretrained(home / "start", dtype=torch.float32)) for _ in range(MEMBERS)
    ]
    optimizers = [inner(model) for model in models]
    for step in range(STEPS):
        # One order for all: in a step each member takes the next of the order's batches.
        order = batch_indices(SEED, step, MEMBERS * BATCH, windows).reshape(MEMBERS, BATCH)
        for own, model, optimizer in zip(order, models, optimizers, strict=True):
            tokens = torch.from_numpy(np.stack([stream[i * L : i * L + L + 1] for i in own]))
            optimizer.zero_grad()
            cross_entropy(model(input_ids=tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if (step + 1) % every and step + 1 < STEPS:
            continue
        for name, before in common.items():
            delta = torch.stack([before - dict(model.named_parameters())[name].detach() for model in models]).mean(0)
            momentum[name] = outer.momentum * momentum[name] + delta
            common[name] = before - outer.lr * (delta + outer.momentum * momentum[name])
            for model in models:
                dict(model.named_parameters())[name].data.copy_(common[name])
    return dict(models[0].state_dict())


@pytest.mark.parametrize(
    ("every", "outer", "optimizer", "inner"),
    [
        pytest.param(1, MEAN, "muon", our_muon, id="mean-muon"),
        pytest.param(EVERY, OUTER, "adamw", plain_adamw, id="nesterov-adamw"),
        pytest.param(1, MEAN, "adamw", plain_adamw, id="mean-adamw", marks=pytest.mark.slow),
        pytest.param(EVERY, OUTER, "muon", our_muon, id="nesterov-muon", marks=pytest.mark.slow),
    ],
)
def test_it_is_local_training_with_outer_steps_written_by_hand(
    home: Path,
    tmp_path: Path,
    every: int,
    outer: Outer,
    optimizer: str,
    inner: Callable[[PreTrainedModel, TrainJob], torch.optim.Optimizer],
) -> None:
    jobs = members(home, tmp_path, recipe=RECIPE.model_copy(update={"name": optimizer}), every=every, outer=outer)
    in_process(jobs)
    found = load_model(jobs[0].output).state_dict()
    expected = by_hand(home, every, outer, lambda model: inner(model, jobs[0]))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert any("experts" in name for name in expected)
    assert any("gate.weight" in name for name in expected)


def test_all_members_end_with_the_same_bits_and_the_first_one_has_the_optimizer_state(
    undisturbed: list[TrainJob],
) -> None:
    first, *others = undisturbed
    for other in others:
        check_same(weights(first.output), weights(other.output))
    assert [(job.output / "optimizer_state").exists() for job in undisturbed] == [True, False, False]
    records = history(first.output.parent.parent / "sync")
    assert [set(record["members"].values()) for record in records] == [
        {3 * BATCH * L},
        {3 * BATCH * L},
        {2 * BATCH * L},
    ]


def test_members_in_bf16_round_independently(home: Path, tmp_path: Path) -> None:
    model = load_model(home / "start", torch.bfloat16)
    parameter = next(model.parameters())
    rounded = []
    for job in members(home, tmp_path, recipe=RECIPE.model_copy(update={"precision": "pure_bf16"}))[:2]:
        optimizer = make_optimizer(model, job, World())
        before = parameter.detach().clone()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        rounded.append(parameter.detach().clone())
        parameter.data.copy_(before)
    assert not torch.equal(*rounded)


# --- interruptions


class Killed(Exception):  # noqa: N818 - what happens to the process, not an error of ours
    pass


def kill_at(number: int) -> Callable[[Event], None]:
    left = iter(range(number))

    def emit(event: Event) -> None:
        if next(left, None) is None:
            raise Killed

    return emit


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_anywhere_it_ends_with_the_same_bits(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, seed: int
) -> None:
    jobs, dice, kills = members(home, tmp_path), random.Random(seed), 0
    while True:
        try:
            in_process(jobs, kill_at(dice.randrange(12, 30)))
            break
        except Killed:
            kills += 1
    assert kills
    for ours, theirs in zip(jobs, undisturbed, strict=True):
        check_same(weights(ours.output), weights(theirs.output))
    for kind in ("exp_avg", "exp_avg_sq"):
        state = Path("optimizer_state") / kind
        check_same(weights(jobs[0].output / state), weights(undisturbed[0].output / state))


def test_members_that_leave_their_slot_at_sync_points_end_with_the_same_bits(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path
) -> None:
    group = SyncGroup(members(home, tmp_path))
    assert group.taken_in_turns() == 3 * MEMBERS  # three sync points, the last one after the last step
    for ours, theirs in zip(group.jobs, undisturbed, strict=True):
        check_same(weights(ours.output), weights(theirs.output))


def test_a_member_that_missed_the_last_sync_point_takes_the_common_model_and_is_finished(
    home: Path, tmp_path: Path
) -> None:
    group = SyncGroup([leaving(job, patience=10.0) for job in members(home, tmp_path)])
    jobs = group.jobs
    assert group.run(jobs[2], stop=stop_after(1)).steps == 1  # and its machine is lost
    finished = set[str]()
    while len(finished) < 2:
        finished |= {job.name for job in jobs[:2] if group.run(job).finished}
        group.coordinator.advance()
        group.now += 11
        if group.coordinator.advance():
            assert group.coordinator.is_over or group.board.progress().arrived == {"seed-0", "seed-1"}
    assert {tuple(record["late"]) for record in history(tmp_path / "sync")} == {("seed-2",)}
    late = group.run(jobs[2])
    assert (late.finished, late.steps) == (True, 3)
    assert group.run(jobs[2]) == late
    check_same(weights(jobs[2].output), weights(jobs[0].output))
