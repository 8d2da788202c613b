"""Gangs read and write models in parts: the same bits at every size, even if a worker is slow or dies (gloo, CPU)."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_processes import alone, gang
from hypothesis import given
from hypothesis import strategies as st
from tiny_training import L, weights, write_shard, write_tiny
from training_worker import Fault

from moedisco_ray.core.config import FAMILIES, FamilyName, Optimizer
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.models import ModelMap, canonical_state, check_same, load_model
from moedisco_ray.models.checkpoint import INDEX
from moedisco_ray.models.optimizer_state import KINDS, OPTIMIZER_FOLDER, open_optimizer_state
from moedisco_ray.training import TrainJob

pytestmark = pytest.mark.timeout(900)

MODELS: dict[str, tuple[int, FamilyName, bool]] = {
    "shared": (4, "qwen2_moe", False),
    "tied": (4, "olmoe", True),
    "dense": (1, "qwen3_moe", False),
    "few": (3, "mixtral", False),
}


@dataclasses.dataclass(frozen=True)
class Home:
    directory: Path
    base: TrainJob

    def job(self, name: str, **changes: Any) -> TrainJob:
        return dataclasses.replace(
            self.base,
            name=name,
            output=self.directory / name / "out",
            checkpoints=self.directory / name / "steps",
            **changes,
        )

    def copies(self, size: int) -> list[TrainJob]:
        """Trainings without a step, which write what they have read."""
        state = self.directory / "before" / "out" / OPTIMIZER_FOLDER
        plain = [self.job(f"{name}-{size}", model=self.directory / name, steps=0) for name in MODELS]
        return [
            *plain,
            self.job(
                f"state-{size}",
                model=self.directory / "shared",
                steps=0,
                optimizer_state=state,
                with_optimizer_state=True,
            ),
        ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    directory = tmp_path_factory.mktemp("gang")
    torch.set_num_threads(1)
    write_shard(directory / "shard")
    for name, (experts, family, tied) in MODELS.items():
        write_tiny(directory / name, experts, family=family, tied=tied)
    home = Home(
        directory,
        TrainJob(
            stage="finetune",
            name="base",
            model=directory / "shared",
            packed_dirs=(directory / "shard",),
            output=directory / "out",
            checkpoints=directory / "steps",
            steps=8,
            sequence_length=L,
            optimizer=Optimizer(lr=3e-3, batch_tokens=4 * L),
            checkpoint_every=3,
            seed=5,
            load_balance=0.05,
        ),
    )
    alone(home.job("before", steps=2, with_optimizer_state=True))
    return home


@pytest.fixture(scope="module")
def two(home: Home) -> Home:
    gang(2, home.directory, [(job, None) for job in home.copies(2)])
    return home


@pytest.fixture(scope="module")
def undisturbed(home: Home) -> Path:
    """The output of a gang's training."""
    gang(2, home.directory, [(job := home.job("undisturbed"), None)])
    return job.output


@pytest.fixture(scope="module")
def four(home: Home) -> Home:
    gang(4, home.directory, [(job, None) for job in home.copies(4)])
    return home


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_gang_of_any_size_writes_the_bits_that_it_has_read(
    request: pytest.FixtureRequest, home: Home, name: str, size: int
) -> None:
    request.getfixturevalue({2: "two", 4: "four"}[size])
    output = home.directory / f"{name}-{size}" / "out"
    check_same(weights(output), weights(home.directory / name))
    assert read_json(output / "config.json") == read_json(home.directory / name / "config.json")
    assert not list(output.parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_a_gang_of_any_size_writes_the_optimizer_state_that_it_has_read(
    request: pytest.FixtureRequest, home: Home, size: int
) -> None:
    request.getfixturevalue({2: "two", 4: "four"}[size])
    found, expected = (
        open_optimizer_state(home.directory / name / "out" / OPTIMIZER_FOLDER) for name in (f"state-{size}", "before")
    )
    assert found is not None
    assert expected is not None
    assert found.steps == expected.steps
    for kind in KINDS:
        check_same(found.tensors[kind], expected.tensors[kind])


@pytest.mark.slow
def test_every_worker_writes_its_share(home: Home) -> None:
    job = home.job("share", steps=0)
    gang(4, home.directory, [(job, None)])
    output = job.output
    files = sorted(output.glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 4
    assert max(sizes) < 0.4 * sum(sizes)
    assert set(read_json(output / INDEX)["weight_map"].values()) == {path.name for path in files}
    model = load_model(output)
    check_same(canonical_state(model.state_dict(), ModelMap("qwen2_moe")), weights(output))


@pytest.mark.slow
def test_a_worker_may_read_and_write_ten_times_longer_than_collectives_wait(home: Home, undisturbed: Path) -> None:
    gang(2, home.directory, [(home.job("slow"), None)], fault=Fault(0, ("load", "save"), seconds=20), timeout=2)
    check_same(weights(home.directory / "slow" / "out"), weights(undisturbed))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "rank"), [("step", 0), ("save", 1)])
def test_a_gang_that_lost_a_worker_ends_up_with_the_same_bits(
    home: Home, undisturbed: Path, place: Any, rank: int
) -> None:
    job = home.job(f"killed-{place}")
    gang(2, home.directory, [(job, None)], fault=Fault(rank, (place,)))
    assert not job.output.exists()
    gang(2, home.directory, [(job, None)])
    check_same(weights(job.output), weights(undisturbed))


@given(st.data(), st.sampled_from(FAMILIES), st.sampled_from(["gate_up_proj", "down_proj"]))
def test_the_pieces_of_all_blocks_make_up_every_tensor_once(
    data: st.DataObject, family: FamilyName, projection: str
) -> None:
    key, names = f"model.layers.1.mlp.experts.{projection}", ModelMap(family)
    shape = (data.draw(st.integers(1, 4)), 2 * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))
    whole = torch.arange(shape[0] * shape[1] * shape[2]).view(shape)
    cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    expected = canonical_state({key: whole}, names)
    found = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    blocks = [list(itertools.pairwise(cut)) for cut in cuts]
    for rows in blocks[0]:
        for columns in blocks[1]:
            for depths in blocks[2]:
                place = (rows, columns, depths)
                block = whole[tuple(slice(a, b) for a, b in place)]
                for piece in names.pieces(key, shape, tuple(a for a, _ in place), tuple(block.shape)):
                    assert (found[piece.name][piece.of_tensor] == -1).all()
                    found[piece.name][piece.of_tensor] = block[piece.of_block]
                    assert piece.is_whole == (block[piece.of_block].shape == found[piece.name].shape)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
