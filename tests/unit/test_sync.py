"""Sync points: what members exchange, and that neither kills nor the order of work changes a bit."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from sync_group import SyncGroup
from tiny_training import BATCH, RECIPE, L, ignore, run, stop_after, variant, weights, write_shard, write_tiny

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import LowMemoryPool, Outer
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.checksums import Entry
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import ModelMap, Role, check_same
from moedisco_ray.policies.sync_points import Arrival, SyncMembers, sync_steps
from moedisco_ray.training import SyncPlan, TrainJob, World, write_partial_result
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.sync import member
from moedisco_ray.training.sync.combine import common_tensors
from moedisco_ray.training.sync.files import SyncPoint, history

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
            sync=SyncPlan(directory / "sync", at, OUTER, ranges=len(STEPS)),
        )
        for k, (steps, at) in enumerate(zip(STEPS, sync_steps(STEPS, every), strict=True))
    ]


def in_process(jobs: Sequence[TrainJob], emit: Callable[[Event], None] = ignore) -> list[Trained]:
    return LocalBackend().train_all(jobs, PLACEMENT, Path(), emit)


def common(directory: Path, number: int) -> dict[str, torch.Tensor]:
    return dict(common_tensors(SyncPoint(directory / "sync", number)))


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
    made = common(tmp_path, 1)
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
    found = history(undisturbed[0].checkpoints.parent / "sync")
    assert [list(entry["members"].values()) for entry in found] == [
        [3 * a_step, 3 * a_step, a_step],
        [3 * a_step, 3 * a_step, 2 * a_step],
        [3 * a_step, 3 * a_step, 2 * a_step],
    ]
    assert all(entry["late"] == [] for entry in found)


def test_only_the_newest_sync_points_keep_their_weights(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of drivers that died when sync points were complete. Before: the weights stayed then."""

    def dies(_point: SyncPoint) -> None:
        raise Killed

    def names(home: Path) -> list[str]:
        return sorted(path.name for path in home.iterdir())

    def kept(jobs: Sequence[TrainJob]) -> dict[str, list[str]]:
        points = sorted((jobs[0].checkpoints.parent / "sync").iterdir())
        return {point.name: names(point) for point in points}

    group = SyncGroup(members(home, tmp_path))
    for _ in group.jobs[0].sync.steps:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(SyncPoint, "clean_up", dies)
            group.taken_in_turns()
        group.restart()
    group.taken_in_turns()
    assert kept(undisturbed) == kept(group.jobs)
    assert kept(undisturbed) == {
        "sync-0001": ["sync.json"],
        "sync-0002": ["common", "momentum", "sync.json"],
        "sync-0003": ["common", "momentum", "sync.json"],
    }


def test_the_coordinator_reads_and_writes_no_weights(home: Path, tmp_path: Path) -> None:
    group = SyncGroup(members(home, tmp_path))
    names = [job.name for job in group.jobs]
    for name in names:  # they have stored nothing
        group.board.arrive(Arrival(name, 1, 10, ((4, "ab"),) * 3))
    assert group.record() == SyncMembers(tuple(names))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["roster.json"]
    for name in names:
        place = group.board.turn(name, 1).number
        group.board.finish(1, place, {f"common/{place}": Entry(4, "cd")})
    assert group.coordinator.advance()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["sync.json"]


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


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
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


def test_a_member_killed_while_it_combines_a_range_has_it_combined_again(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, calls, combine = SyncGroup(members(home, tmp_path)), iter(range(100)), member.combine

    def dies(*arguments: object, **named: object) -> object:
        found = combine(*arguments, **named)  # type: ignore[arg-type]
        if next(calls) == 1:
            raise Killed
        return found

    monkeypatch.setattr(member, "combine", dies)
    with pytest.raises(Killed):
        group.taken_in_turns()
    group.taken_in_turns()
    same(group.jobs, undisturbed)


@pytest.mark.parametrize("slots", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_slots_and_a_driver_lost_at_every_point_give_the_same_bits(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, slots: int
) -> None:
    """The driver is lost before and after each roster is recorded; members leave their slots meanwhile."""
    group, advance = SyncGroup(members(home, tmp_path)), 0
    finished = set[str]()
    while len(finished) < len(STEPS):
        group.restart()
        waiting = [job for job in group.jobs if job.name not in finished and not group.coordinator.is_waiting(job.name)]
        for job in waiting[:slots]:
            finished |= {job.name} if group.run(job).finished else set()
        group.restart()
        advance += group.coordinator.advance()
    assert advance == 3
    same(group.jobs, undisturbed)


def test_a_member_that_leaves_and_comes_back_is_the_member_that_waited(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path
) -> None:
    group = SyncGroup(members(home, tmp_path))
    assert group.taken_in_turns() == 3 * len(group.jobs)
    same(group.jobs, undisturbed)


def test_a_new_driver_takes_the_recorded_members_although_more_have_arrived(home: Path, tmp_path: Path) -> None:
    group = SyncGroup([with_patience(job) for job in members(home, tmp_path)])
    for job in group.jobs[:2]:
        group.run(job)
    group.coordinator.advance()
    group.now += 11
    assert group.record() == SyncMembers(("submodel-0", "submodel-1"), ("submodel-2",))
    group.run(group.jobs[2], stop=stop_after(1))
    SyncPoint(tmp_path / "sync", 1).publish("submodel-2", weights(home / "dense"), 3, BATCH * L)
    group.restart()
    group.taken_in_turns()
    assert sorted(history(tmp_path / "sync")[0]["members"]) == ["submodel-0", "submodel-1"]


@pytest.mark.slow
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


# --- stragglers


def with_patience(job: TrainJob) -> TrainJob:
    assert job.sync is not None
    return dataclasses.replace(job, sync=dataclasses.replace(job.sync, patience=10.0))


def complete_one(group: SyncGroup, jobs: Sequence[TrainJob]) -> None:
    """Train some members up to their next sync point; the first one combines, and continues to the one after it."""
    for job in jobs:
        group.run(job)
    assert group.record().members == tuple(job.name for job in jobs)
    group.run(jobs[0])
    assert not group.board.progress().ranges


def test_a_late_member_loads_the_newest_backbone_and_joins_the_next_sync_point(home: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    group = SyncGroup([with_patience(job) for job in members(home, tmp_path)], events.append)
    for job in group.jobs[:2]:
        group.run(job)
    assert not group.coordinator.advance()
    group.now += 11
    assert group.record() == SyncMembers(("submodel-0", "submodel-1"), ("submodel-2",))
    group.run(group.jobs[0])
    assert events[0].data["late"] == ["submodel-2"]
    assert group.run(group.jobs[2]).steps == 3  # past its first sync point, which is complete, up to its second
    assert group.coordinator.is_waiting("submodel-2")
    group.taken_in_turns()
    found = history(tmp_path / "sync")
    assert [sorted(entry["members"]) for entry in found] == [
        ["submodel-0", "submodel-1"],
        *[["submodel-0", "submodel-1", "submodel-2"]] * 2,
    ]
    assert found[1]["members"]["submodel-2"] == 2 * BATCH * L


def test_a_late_member_that_arrives_while_others_combine_has_no_part_in_the_sum(home: Path, tmp_path: Path) -> None:
    made = []
    for late_combines in (False, True):
        directory = tmp_path / str(late_combines)
        group = SyncGroup([with_patience(job) for job in members(home, directory)])
        for job in group.jobs[:2]:
            group.run(job)
        group.coordinator.advance()
        group.now += 11
        assert group.record().late == ("submodel-2",)
        group.run(group.jobs[2 if late_combines else 0])
        made.append(common(directory, 1))
    check_same(*made)


def test_a_member_that_is_not_waited_for_has_the_newest_backbone_and_its_own_experts(
    home: Path, tmp_path: Path
) -> None:
    group = SyncGroup(members(home, tmp_path))
    late = group.jobs[2]
    assert group.run(late).steps == 1  # its first sync point
    group.coordinator.remove("submodel-2")
    for _ in range(2):
        complete_one(group, group.jobs[:2])
    alone = variant(late, "alone", sync=None)
    run(alone, stop=stop_after(1))
    write_partial_result(alone)
    write_partial_result(late)
    newest = common(tmp_path, 2)
    stood, written = weights(alone.output), weights(late.output)
    assert set(written) == set(stood) > set(newest)
    for key, tensor in written.items():
        assert torch.equal(tensor, newest[key] if key in newest else stood[key]), key
    assert any(not torch.equal(stood[key], newest[key]) for key in newest)


def test_a_member_two_sync_points_late_waits_for_its_next_open_one(home: Path, tmp_path: Path) -> None:
    group = SyncGroup(members(home, tmp_path))
    group.coordinator.remove("submodel-2")
    for _ in range(2):
        complete_one(group, group.jobs[:2])
    assert group.run(group.jobs[2]).steps == 5  # its third sync point
    assert SyncPoint(tmp_path / "sync", 3).arrival("submodel-2") is not None


def test_publishing_while_the_sync_point_completes_does_no_harm(home: Path, tmp_path: Path) -> None:
    group = SyncGroup(members(home, tmp_path))
    group.coordinator.remove("submodel-2")

    class Slowly(dict[str, torch.Tensor]):
        def values(self) -> Iterator[torch.Tensor]:  # type: ignore[override]
            for i, tensor in enumerate(super().values()):
                if i == 1:
                    complete_one(group, group.jobs[:2])
                yield tensor

    with pytest.raises(FileNotFoundError):
        SyncPoint(tmp_path / "sync", 1).publish("submodel-2", Slowly(weights(home / "dense")), 3, BATCH * L)
    assert group.run(group.jobs[2]).steps == 3  # it continues from the backbone of the others
    complete_one(group, group.jobs[:2])
    assert sorted(path.name for path in (tmp_path / "sync/sync-0001").iterdir()) == ["common", "momentum", "sync.json"]
