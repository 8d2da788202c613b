"""Trainings whose members exchange 4 bits per weight: what they compute, and that no kill changes a bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from sync_group import SyncGroup
from test_parallel_seed import BATCH, MEAN, MEMBERS, OUTER, by_hand, in_process, plain_adamw
from test_parallel_seed import members as of_the_seed
from test_sync import members as of_submodels
from tiny_training import L, run, weights, write_shard, write_tiny

from moedisco_ray.core.config import Optimizer, Outer
from moedisco_ray.core.errors import NotFiniteError
from moedisco_ray.execution.sync_board import SyncBoard
from moedisco_ray.models import check_same, load_model
from moedisco_ray.training import DataShare, TrainJob, World, stepper
from moedisco_ray.training.sync import coded, member
from moedisco_ray.training.sync.coded import CodedWeights
from moedisco_ray.training.sync.files import SyncPoint


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("coded")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "start", 4)
    write_tiny(home / "dense", 1)
    return home


def in_4_bits(jobs: Sequence[TrainJob], ranges: int = MEMBERS) -> list[TrainJob]:
    return [
        dataclasses.replace(job, sync=dataclasses.replace(job.sync, bits=4, ranges=ranges)) for job in jobs if job.sync
    ]


def members(
    home: Path, directory: Path, ranges: int = MEMBERS, *, every: int = 3, outer: Outer = OUTER
) -> list[TrainJob]:
    return in_4_bits(of_the_seed(home, directory, every=every, outer=outer), ranges)


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TrainJob]:
    jobs = members(home, tmp_path_factory.mktemp("undisturbed"))
    in_process(jobs)
    return jobs


def same(jobs: Sequence[TrainJob], others: Sequence[TrainJob]) -> None:
    for ours, theirs in zip(jobs, others, strict=True):
        check_same(weights(ours.output), weights(theirs.output))


# --- what it computes


def test_it_is_near_local_training_with_outer_steps_written_by_hand(home: Path, tmp_path: Path) -> None:
    jobs = members(home, tmp_path, every=3, outer=OUTER)
    in_process(jobs)
    found, start = load_model(jobs[0].output).state_dict(), load_model(home / "start").state_dict()
    expected = by_hand(home, 3, OUTER, lambda model: plain_adamw(model, jobs[0]))
    moved = sum(float((expected[name] - start[name]).square().sum()) for name in expected)
    apart = sum(float((expected[name] - found[name]).square().sum()) for name in expected)
    assert 0 < apart < 0.15**2 * moved


def test_all_members_end_with_the_same_bits_for_any_number_of_ranges(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path
) -> None:
    one = members(home, tmp_path, ranges=1)
    in_process(one)
    same(one, undisturbed)
    same(one[1:], one[:-1])


def test_every_step_with_a_plain_mean_of_exact_weights_is_joint_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient descent, whose steps are linear in the gradient, and without clipping."""
    monkeypatch.setattr(
        stepper, "make_optimizer", lambda model, job, _world: torch.optim.SGD(model.parameters(), lr=job.optimizer.lr)
    )
    monkeypatch.setattr(stepper, "LARGEST_NORM", 1e9)
    recipe = Optimizer(lr=0.3, batch_tokens=BATCH * L)
    jobs = [
        dataclasses.replace(job, with_optimizer_state=False)
        for job in of_the_seed(home, tmp_path, recipe=recipe, every=1, outer=MEAN)
    ]
    joint = dataclasses.replace(
        jobs[0],
        name="joint",
        output=tmp_path / "joint",
        checkpoints=tmp_path / "joint-steps",
        optimizer=recipe.model_copy(update={"batch_tokens": MEMBERS * BATCH * L}),
        share=DataShare(),
        sync=None,
    )
    in_process(jobs)
    run(joint)
    expected, start = weights(joint.output), weights(home / "start")
    for name, tensor in weights(jobs[0].output).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1e-2


def size_of(point: SyncPoint, kind: str) -> int:
    return sum(path.stat().st_size for path in point.path(kind).glob("*.bin"))


def test_members_move_an_eighth_of_the_bytes(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int, int]] = []

    def measured(point: SyncPoint) -> None:
        [published] = {path.stat().st_size for path in point.path("members").glob("*.bin")}
        sizes.append((published, size_of(point, "update"), size_of(point, "common")))

    monkeypatch.setattr(SyncPoint, "clean_up", measured)
    in_process(members(home, tmp_path))
    assert len(sizes) == 3
    for published, update, common in sizes:
        assert published <= 0.15 * common
        assert update <= 0.15 * common


# --- interruptions


class Killed(Exception):  # noqa: N818 - what happens to the process, not an error of ours
    pass


def dying(function: Callable[..., object], number: int, *, before: bool) -> Callable[..., object]:
    """The function, of one member at a sync point, which dies once before or after it."""
    died: list[bool] = []

    def called(self: object, point: SyncPoint, *arguments: object, **named: object) -> object:
        dies = point.number == number and not died
        died.extend([True] * dies)
        if dies and before:
            raise Killed
        found = function(self, point, *arguments, **named)
        if dies:
            raise Killed
        return found

    return called


@pytest.mark.parametrize(
    ("name", "before"),
    [pytest.param("publish", False, id="after-publishing"), pytest.param("load", True, id="before-loading")],
)
def test_killed_at_a_sync_point_it_ends_with_the_same_bits(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: bool
) -> None:
    jobs = members(home, tmp_path)
    monkeypatch.setattr(CodedWeights, name, dying(getattr(CodedWeights, name), 2, before=before))
    with pytest.raises(Killed):
        in_process(jobs)
    in_process(jobs)
    same(jobs, undisturbed)


def test_members_that_live_add_updates_and_restarted_ones_read_the_common_weights(
    home: Path, undisturbed: list[TrainJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    of = coded.common_tensors
    monkeypatch.setattr(coded, "common_tensors", lambda point: read.append(point.number) or of(point))
    in_process(members(home, tmp_path / "live"))
    assert not read
    group = SyncGroup(members(home, tmp_path / "leaving"))  # each member leaves its slot when it has published
    assert group.taken_in_turns() == 3 * MEMBERS
    assert set(read) == {1, 2}
    same(group.jobs, undisturbed)


def test_sub_models_exchange_codes_of_their_backbones(home: Path, tmp_path: Path) -> None:
    made = []
    for name in ("live", "leaving"):
        group = SyncGroup(in_4_bits(of_submodels(home, tmp_path / name)))
        if name == "live":
            in_process(group.jobs)
        else:
            group.taken_in_turns()
        made.append(group.jobs)
    same(*made)


def test_a_member_that_others_have_passed_meanwhile_takes_the_newest_weights(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others complete the next sync point and delete the weights that a restarted member reads."""
    jobs = members(home, tmp_path)
    in_process(jobs)
    sync = jobs[0].sync
    assert sync is not None
    model = load_model(home / "start")
    metrics = type("Metrics", (), {"progress": type("Progress", (), {"sync_point": 1})()})()
    kept = member.coded_weights(jobs[0], model)
    joining = member.SyncMember(jobs[0], model, metrics, World(), SyncBoard(), coded=kept)  # type: ignore[arg-type]
    loaded = joining._load(SyncPoint(sync.directory, 2), sync)  # the weights of sync point 1 are deleted
    assert loaded.number == 3
    assert kept is not None
    assert not kept.residual_N.any()
    check_same(weights(jobs[0].output), dict(coded.common_tensors(loaded)))


def test_weights_that_are_not_finite_end_the_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = CodedWeights.publish

    def broken(self: CodedWeights, point: SyncPoint, name: str, tensors: dict[str, torch.Tensor], *rest: int) -> object:
        next(iter(tensors.values())).view(-1)[5] = float("inf")
        return publish(self, point, name, tensors, *rest)

    monkeypatch.setattr(CodedWeights, "publish", broken)
    with pytest.raises(NotFiniteError, match=r"seed-0: a value is not finite in the weights after step 3; lower"):
        in_process(members(home, tmp_path))
