"""Sync points: what members exchange, and that neither kills nor the order of work changes a bit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from tiny_training import BATCH, RECIPE, L, ignore, never, run, stop_after, variant, weights, write_shard, write_tiny

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import LowMemoryPool, Outer
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import ModelMap, Role, check_same, open_checkpoint
from moedisco_ray.policies.sync_points import sync_steps
from moedisco_ray.training import SyncCoordinator, SyncPlan, TrainJob, World, train, write_partial_result
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.sync import exchange

STEPS = (12, 12, 7)
OUTER = Outer(lr=0.7, momentum=0.9)
PLACEMENT = Placement(LowMemoryPool(), 1, 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("sync")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "dense", 1)
    return home


def members(home: Path, directory: Path, precision: str = "fp32", every: int = 3, **recipe: str) -> list[TrainJob]:
    return [
        TrainJob(
            stage="submodels",
            name=f"submodel-{k}",
            model=home / "dense",
            packed_dirs=(home / "shard",),
            output=directory / f"out-{k}",
            checkpoints=directory / f"steps-{k}",
            steps=steps,
            sequence_length=L,
            optimizer=RECIPE.model_copy(update={"precision": precision, **recipe}),
            checkpoint_every=5,
            seed=k,
            log_every=1,
            sync=SyncPlan(directory / "sync", at, OUTER),
        )
        for k, (steps, at) in enumerate(zip(STEPS, sync_steps(STEPS, every), strict=True))
    ]


def in_process(jobs: Sequence[TrainJob], emit: Callable[[Event], None] = ignore) -> list[Trained]:
    return LocalBackend().train_all(jobs, PLACEMENT, Path(), emit)


def same(jobs: Sequence[TrainJob], others: Sequence[TrainJob]) -> None:
    for ours, theirs in zip(jobs, others, strict=True):
        check_same(weights(ours.output), weights(theirs.output))


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TrainJob]:
    jobs = members(home, tmp_path_factory.mktemp("undisturbed"))
    in_process(jobs)
    return jobs


def test_a_sync_point_makes_the_outer_step_on_the_backbones_of_its_members(home: Path, tmp_path: Path) -> None:
    jobs = members(home, tmp_path, every=6)
    in_process(jobs)
    made = exchange.open_common(tmp_path / "sync", 1)
    assert set(made) == {
        key for key in weights(home / "dense") if ModelMap("qwen3_moe").classify(key).role is Role.BACKBONE
    }
    alone = []
    for job, steps in zip(jobs, (6, 6, 3), strict=True):
        lonely = variant(job, f"{job.name}-alone", sync=None)
        assert run(lonely, stop=stop_after(steps)).steps == steps
        model = trainable(job.model, job.optimizer, World())
        found = checkpoint.latest(lonely.checkpoints)
        assert found is not None
        checkpoint.load(checkpoint.storage_of(lonely), found, model, make_optimizer(model, lonely, World()), World())
        alone.append(dict(model.state_dict()))
    for key, start in weights(home / "dense").items():
        if key in made:
            moved = sum(share * (start - state[key]) for share, state in zip((0.4, 0.4, 0.2), alone, strict=True))
            torch.testing.assert_close(made[key], start - 0.7 * 1.9 * moved, rtol=1e-5, atol=1e-6)


def test_every_sync_point_counts_the_tokens_of_its_members(undisturbed: list[TrainJob]) -> None:
    a_step = BATCH * L
    found = exchange.history(undisturbed[0].checkpoints.parent / "sync")
    assert [list(entry["members"].values()) for entry in found] == [
        [3 * a_step, 3 * a_step, a_step],
        [3 * a_step, 3 * a_step, 2 * a_step],
        [3 * a_step, 3 * a_step, 2 * a_step],
    ]
    assert all(entry["late"] == [] for entry in found)


def test_only_the_newest_sync_points_keep_their_weights(undisturbed: list[TrainJob]) -> None:
    directory = undisturbed[0].checkpoints.parent / "sync"
    kept = {home.name: sorted(path.name for path in home.iterdir()) for home in sorted(directory.iterdir())}
    assert kept == {
        "sync-0001": ["sync.json"],
        "sync-0002": ["common", "momentum", "sync.json"],
        "sync-0003": ["common", "momentum", "sync.json"],
    }


def test_sync_points_bring_the_backbones_of_members_together(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path
) -> None:
    jobs = [dataclasses.replace(job, sync=None) for job in members(home, tmp_path)]
    in_process(jobs)

    def distance(pair: Sequence[TrainJob]) -> float:
        one, other = (weights(job.output) for job in pair)
        return float((one["lm_head.weight"] - other["lm_head.weight"]).norm())

    assert distance(undisturbed[:2]) < 0.8 * distance(jobs[:2])


# --- interruptions


class Killed(Exception):  # noqa: N818 - what happens to the process, not an error of ours
    pass


def kill_at(number: int) -> Callable[[Event], None]:
    """Dies at an event: a step, the end of a member's turn after it published, an unread sync point."""
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
            # Never so early that nothing new is saved: the longest way between two checkpoints, over all members.
            in_process(jobs, kill_at(dice.randrange(15, 50)))
            break
        except Killed:
            kills += 1
    assert kills
    same(jobs, undisturbed)


@pytest.mark.parametrize("what", ["next_momentum", "next_common", "write_json"])
def test_killed_inside_the_outer_step_it_is_made_again(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    jobs = members(home, tmp_path)
    calls = iter(range(100))
    original = getattr(exchange, what)

    def dies(*args: object) -> object:
        if next(calls) == (4 if what == "write_json" else 1):  # each member writes its record as JSON too
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(exchange, what, dies)
        with pytest.raises(Killed):
            in_process(jobs)
    in_process(jobs)
    same(jobs, undisturbed)


def test_a_member_that_leaves_and_comes_back_is_the_member_that_waited(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path
) -> None:
    jobs = members(home, tmp_path)
    coordinator = SyncCoordinator(jobs, ignore)
    waited = taken_in_turns(jobs, coordinator)
    assert waited == 3 * len(jobs)
    same(jobs, undisturbed)


@pytest.mark.parametrize("recipe", [{"precision": "pure_bf16"}, {"name": "muon"}], ids=["bf16", "muon"])
def test_killed_with_other_optimizer_state_equals_undisturbed(
    home: Path, tmp_path: Path, recipe: dict[str, str]
) -> None:
    whole, halted = members(home, tmp_path / "a", **recipe), members(home, tmp_path / "b", **recipe)
    in_process(whole)
    with pytest.raises(Killed):
        in_process(halted, kill_at(22))
    in_process(halted)
    same(halted, whole)


def taken_in_turns(jobs: Sequence[TrainJob], coordinator: SyncCoordinator) -> int:
    """A queue with one slot, which a waiting member leaves; returns how often one left it unfinished."""
    left, finished = 0, set[str]()
    while len(finished) < len(jobs):
        for job in jobs:
            if job.name not in finished and not coordinator.is_waiting(job.name):
                result = train(leaving(job), World(), ignore, never)
                assert result.finished is not result.waits_for_sync
                left += result.waits_for_sync
                finished |= {job.name} if result.finished else set()
        ready = coordinator.ready_members()
        if ready is not None:
            coordinator.combine(ready)
    return left


def leaving(job: TrainJob) -> TrainJob:
    assert job.sync is not None
    return dataclasses.replace(job, sync=dataclasses.replace(job.sync, max_wait=0.0))


# --- stragglers


def complete_one(jobs: Sequence[TrainJob], coordinator: SyncCoordinator) -> None:
    """Train some members up to their next sync point and complete it with them."""
    for job in jobs:
        run(job)
    ready = coordinator.ready_members()
    assert ready is not None
    coordinator.combine(ready)


def test_a_late_member_loads_the_newest_backbone_and_joins_the_next_sync_point(home: Path, tmp_path: Path) -> None:
    jobs = [
        dataclasses.replace(job, sync=dataclasses.replace(job.sync, patience=10.0, max_wait=0.0))
        for job in members(home, tmp_path)
        if job.sync is not None
    ]
    now = 0.0
    events: list[Event] = []
    coordinator = SyncCoordinator(jobs, events.append, lambda: now)
    for job in jobs[:2]:
        run(job)
    assert coordinator.ready_members() is None
    now = 11.0
    ready = coordinator.ready_members()
    assert ready is not None
    assert (ready.members, ready.late) == (("submodel-0", "submodel-1"), ("submodel-2",))
    coordinator.combine(ready)
    assert events[0].data["late"] == ["submodel-2"]
    assert run(jobs[2]).steps == 3  # past its first sync point, which is complete without it, up to its second
    assert coordinator.is_waiting("submodel-2")
    taken_in_turns(jobs, coordinator)
    found = exchange.history(tmp_path / "sync")
    assert [sorted(entry["members"]) for entry in found] == [
        ["submodel-0", "submodel-1"],
        *[["submodel-0", "submodel-1", "submodel-2"]] * 2,
    ]
    assert found[1]["members"]["submodel-2"] == 2 * BATCH * L


def test_a_member_that_is_not_waited_for_has_the_newest_backbone_and_its_own_experts(
    home: Path, tmp_path: Path
) -> None:
    jobs = [leaving(job) for job in members(home, tmp_path)]
    coordinator = SyncCoordinator(jobs, ignore)
    assert run(jobs[2]).steps == 1  # its first sync point
    coordinator.remove("submodel-2")
    for _ in range(2):
        complete_one(jobs[:2], coordinator)
    alone = variant(jobs[2], "alone", sync=None)
    run(alone, stop=stop_after(1))
    write_partial_result(alone)
    write_partial_result(jobs[2])
    common = exchange.open_common(tmp_path / "sync", 2)
    stood, written = weights(alone.output), weights(jobs[2].output)
    assert set(written) == set(stood) > set(common)
    for key, tensor in written.items():
        assert torch.equal(tensor, common[key] if key in common else stood[key]), key
    assert any(not torch.equal(stood[key], common[key]) for key in common)


def test_a_member_two_sync_points_late_waits_for_its_next_open_one(home: Path, tmp_path: Path) -> None:
    jobs = [leaving(job) for job in members(home, tmp_path)]
    coordinator = SyncCoordinator(jobs, ignore)
    coordinator.remove("submodel-2")
    for _ in range(2):
        complete_one(jobs[:2], coordinator)
    assert run(jobs[2]).steps == 5  # its third sync point
    assert exchange.has_published(tmp_path / "sync", 3, "submodel-2")


def test_publishing_while_the_sync_point_completes_does_no_harm(home: Path, tmp_path: Path) -> None:
    jobs, directory = [leaving(job) for job in members(home, tmp_path)], tmp_path / "sync"
    coordinator = SyncCoordinator(jobs, ignore)
    coordinator.remove("submodel-2")

    def slowly() -> Iterator[tuple[str, torch.Tensor]]:
        for i, tensor in enumerate(weights(home / "dense").items()):
            if i == 1:
                complete_one(jobs[:2], coordinator)
            yield tensor

    exchange.publish(
        directory,
        1,
        "submodel-2",
        slowly(),
        config=open_checkpoint(home / "dense").config,
        record=exchange.MemberRecord(1, BATCH * L),
    )
    assert run(jobs[2]).steps == 3  # it continues from the backbone of the others
    complete_one(jobs[:2], coordinator)
    assert sorted(path.name for path in (directory / "sync-0001").iterdir()) == ["common", "momentum", "sync.json"]


def test_a_restarted_coordinator_knows_the_sync_points(home: Path, undisturbed: list[TrainJob], tmp_path: Path) -> None:
    jobs = [leaving(job) for job in members(home, tmp_path)]
    for job in jobs:
        run(job)
    ready = SyncCoordinator(jobs, ignore).ready_members()
    assert ready is not None
    SyncCoordinator(jobs, ignore).combine(ready)
    taken_in_turns(jobs, SyncCoordinator(jobs, ignore))
    same(jobs, undisturbed)
    assert SyncCoordinator(jobs, ignore).ready_members() is None
