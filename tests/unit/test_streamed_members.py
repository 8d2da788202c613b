"""Members whose weights are in the host's memory: the bits of members with theirs on the card, whatever interrupts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from sync_group import SyncGroup
from test_coded_syncs import in_4_bits, same
from test_parallel_seed import OUTER, RECIPE, Killed, in_process, kill_at
from test_parallel_seed import members as of_the_seed
from tiny_training import write_shard, write_tiny

from moedisco_ray.core.config import Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.training import TrainJob

SYNCS = 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("streamed-members")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "start", 4)
    return home


def members(home: Path, directory: Path, name: str, bits: int | None, memory: str) -> list[TrainJob]:
    recipe = Optimizer.model_validate(RECIPE.model_dump() | {"name": name, "micro_batch": 2})
    jobs = of_the_seed(home, directory, recipe=recipe, outer=OUTER)
    jobs = in_4_bits(jobs) if bits else jobs
    return [dataclasses.replace(job, memory=memory, load_balance=0.02, z_loss=0.001) for job in jobs]


def losses(jobs: Sequence[TrainJob]) -> list[tuple[float, ...]]:
    return [each.result.losses for each in in_process(jobs)]


Bits = Literal[4] | None


@pytest.mark.parametrize(
    ("name", "bits"),
    [pytest.param("muon", 4, marks=pytest.mark.slow), pytest.param("adamw", None, marks=pytest.mark.slow)],
)
def test_streamed_members_give_the_bits_of_resident_ones_interrupted_or_not(
    home: Path, tmp_path: Path, name: str, bits: Bits
) -> None:
    """The losses are equal step by step too, so each member takes the same batches in the same order."""
    resident, streamed, killed, leaving = (
        members(home, tmp_path / place, name, bits, "resident" if place == "resident" else "streamed")
        for place in ("resident", "streamed", "killed", "leaving")
    )
    assert losses(streamed) == losses(resident)
    same(streamed, resident)
    events: list[Event] = []
    for count in (25, 14):  # after a sync point, and before the next one
        with pytest.raises(Killed):
            in_process(killed, kill_at(count))
    in_process(killed, events.append)
    assert len([event for event in events if event.type == "sync"]) < SYNCS  # it has continued
    same(killed, resident)
    group = SyncGroup(leaving)
    assert group.taken_in_turns() == SYNCS * len(leaving)
    same(leaving, resident)


def test_a_member_may_change_where_its_weights_are(home: Path, tmp_path: Path) -> None:
    resident, streamed = (members(home, tmp_path / "one", "muon", 4, memory) for memory in ("resident", "streamed"))
    undisturbed = members(home, tmp_path / "undisturbed", "muon", 4, "resident")
    in_process(undisturbed)
    with pytest.raises(Killed):
        in_process(resident, kill_at(25))
    in_process(streamed)
    same(streamed, undisturbed)
