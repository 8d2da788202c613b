"""Syncs on Ray: members that share a slot, and members that wait warm, make the bits of one plain process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import RECIPE, L, write_shard, write_tiny

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import LowMemoryPool, Outer
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.backend import train_all
from moedisco_ray.training import SyncPlan, TrainJob

pytestmark = [pytest.mark.ray, pytest.mark.timeout(200)]


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_members_reach_the_bits_of_one_process(ray_cluster: None, tmp_path: Path, slots: int) -> None:
    torch.set_num_threads(1)
    write_shard(tmp_path / "shard")
    write_tiny(tmp_path / "dense", 1)

    def jobs(place: Path) -> list[TrainJob]:
        return [
            TrainJob(
                stage="submodels",
                name=f"submodel-{k}",
                model=tmp_path / "dense",
                packed_dirs=(tmp_path / "shard",),
                output=place / f"out-{k}",
                checkpoints=place / f"home-{k}" / "steps",
                steps=8,
                sequence_length=L,
                optimizer=RECIPE,
                checkpoint_every=100,
                seed=k,
                sync=SyncPlan(place / "sync", (4,), Outer(), ranges=2),
            )
            for k in range(2)
        ]

    placement = Placement(LowMemoryPool(max_workers=slots), 1, 0)
    events: list[Event] = []
    here, there = jobs(tmp_path / "here"), jobs(tmp_path / "there")
    LocalBackend().train_all(here, placement, tmp_path, events.append)
    events.clear()
    trained = train_all(there, placement, tmp_path / "ray", events.append)
    for ours, theirs in zip(there, here, strict=True):
        assert (ours.output / "model.safetensors").read_bytes() == (theirs.output / "model.safetensors").read_bytes()
    assert [event.data["members"] for event in events if event.type == "sync"] == [["submodel-0", "submodel-1"]]
    # With a slot for each, none frees its slot; with one slot, each frees it once and continues from its checkpoint.
    assert len([event for event in events if event.type == "unit_started"]) == (2 if slots == 2 else 4)
    assert [done.result.restored_step for done in trained] == ([0, 0] if slots == 2 else [4, 4])
    assert not [event for event in events if event.type == "worker_restarted"]
