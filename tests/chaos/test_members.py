"""Members of the whole MoE that are killed, late or new at seeded moments: the same rosters give the same bits.

CHAOS_SEEDS is the number of seeds of each test.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from spot_nodes import SpotNodes
from sync_group import SyncGroup, leaving
from tiny_training import L, weights, write_shard, write_tiny
from waiting import until

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool, Optimizer, Outer, Residence
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.models import check_same
from moedisco_ray.training import DataShare, SyncPlan, TrainJob
from moedisco_ray.training.sync.files import history

SEEDS = int(os.environ.get("CHAOS_SEEDS", "2"))
LOW, MEMBERS, AT = LowMemoryPool(), 2, (80, 160, 240)
PATIENCE = 15.0
"""Seconds that a member waits for another one."""
pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("members")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "start", 4)
    return home


def members(
    home: Path, directory: Path, *, memory: Residence, patience: float | None = None, every: int = 30
) -> list[TrainJob]:
    sync = SyncPlan(directory / "sync", AT, Outer(lr=0.7, momentum=0.6), patience, scope="all", ranges=MEMBERS, bits=4)
    return [
        TrainJob(
            stage="seed",
            name=f"seed-{k}",
            model=home / "start",
            packed_dirs=(home / "shard",),
            output=directory / f"home-{k}" / "trained",
            checkpoints=directory / f"home-{k}" / "steps",
            steps=AT[-1],
            sequence_length=L,
            optimizer=Optimizer(name="muon", lr=1e-3, batch_tokens=4 * L, micro_batch=2),
            checkpoint_every=every,
            log_every=10,
            load_balance=0.02,
            share=DataShare(k, MEMBERS),
            memory=memory,
            sync=sync,
        )
        for k in range(MEMBERS)
    ]


class MemberKiller:
    """Sends SIGKILL to the process of a member when it reports a step, once."""

    def __init__(self, name: str, step: int) -> None:
        self._name, self._step, self._pid = name, step, 0
        self.done = False

    def __call__(self, event: Event) -> None:
        if event.unit != self._name:
            return
        if event.type == "unit_started":
            self._pid = event.data["pid"]
        elif event.type == "progress" and event.data["step"] >= self._step and not self.done:
            os.kill(self._pid, signal.SIGKILL)
            self.done = True


def replayed(jobs: Sequence[TrainJob], rosters: list[list[str]]) -> list[TrainJob]:
    """The members in one process, undisturbed, with the rosters of another training."""
    group = SyncGroup([leaving(job, patience=1.0) for job in jobs])
    by_name = {job.name: job for job in group.jobs}
    for roster in rosters:
        for name in roster:
            assert group.run(by_name[name]).waits_for_sync
        if not group.coordinator.advance():  # it waits for one that is late
            group.now += 2
            assert group.coordinator.advance()
        group.run(by_name[roster[0]])  # it combines, loads, and goes on
    for job in group.jobs:
        assert group.run(job).finished
    assert rosters_of(group.jobs) == rosters
    return group.jobs


def check_bits(ours: Sequence[TrainJob], theirs: Sequence[TrainJob]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        check_same(weights(one.output), weights(other.output))


def rosters_of(jobs: Sequence[TrainJob]) -> list[list[str]]:
    assert jobs[0].sync is not None
    return [list(record["members"]) for record in history(jobs[0].sync.directory)]


@pytest.mark.parametrize("memory", ["resident", "streamed"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_members_that_are_killed_end_with_the_bits_of_undisturbed_ones(
    nodes: SpotNodes, home: Path, tmp_path: Path, seed: int, memory: Residence
) -> None:
    nodes.reset({LOW.resource: MEMBERS})
    dice = random.Random(seed)
    jobs, here = (members(home, tmp_path / place, memory=memory) for place in ("there", "here"))
    killer = MemberKiller(dice.choice(jobs).name, dice.randrange(10, AT[-1] - 30))
    trained = train_all(jobs, Placement(LOW, 1, MEMBERS), tmp_path / "ray", killer)
    assert all(each.result.finished for each in trained)
    assert killer.done
    assert rosters_of(jobs) == [[job.name for job in jobs]] * len(AT)
    check_bits(jobs, replayed(here, rosters_of(jobs)))
    nodes.check_nothing_is_left()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_late_member_joins_again_and_the_same_rosters_give_the_same_bits(
    nodes: SpotNodes, home: Path, tmp_path: Path, seed: int
) -> None:
    """Its machine is gone for a sync. With an odd seed it has no checkpoint, and comes back as a new member."""
    nodes.reset({LOW.resource: MEMBERS})
    dice, events = random.Random(seed), list[Event]()
    memory: Residence = "streamed" if seed % 2 else "resident"
    every = 10_000 if seed % 2 else 20
    jobs, here = (
        members(home, tmp_path / place, memory=memory, patience=PATIENCE, every=every) for place in ("there", "here")
    )
    late, step = dice.choice(jobs).name, dice.randrange(20, AT[0] - 20)

    def reached() -> list[Event]:
        return [each for each in events if each.unit == late and each.type == "progress" and each.data["step"] >= step]

    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train_all, jobs, Placement(LOW, 1, MEMBERS), tmp_path / "ray", events.append)
        until(lambda: bool(reached()), 90)
        started = [each for each in events if each.type == "unit_started" and each.unit == late]
        nodes.kill(started[-1].data["node_id"])
        until(lambda: any(each.type == "sync" for each in events), 4 * PATIENCE)
        nodes.add(LOW.resource)
        trained = training.result(180)
    assert all(each.result.finished for each in trained)
    rosters = rosters_of(jobs)
    assert late not in rosters[0]
    check_bits(jobs[1:], jobs[:1])
    check_bits(jobs, replayed(here, rosters))
    nodes.check_nothing_is_left()
