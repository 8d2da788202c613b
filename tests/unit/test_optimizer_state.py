"""Optimizer state is handed from one training to the next, and merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import OneCorpus, small_config
from tiny_training import BATCH, L, run, variant, weights, write_shard, write_tiny

from moedisco_ray.core.config import Optimizer, put
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.models import ModelMap, Role, canonical_shapes, check_same, open_checkpoint, read_config, same_bits
from moedisco_ray.models.optimizer_state import (
    KINDS,
    OPTIMIZER_FOLDER,
    Kind,
    OptimizerState,
    open_optimizer_state,
    write_optimizer_state,
)
from moedisco_ray.policies.retrying import Skip
from moedisco_ray.stages.merge.optimizer_state import merge_optimizer_states
from moedisco_ray.training import TrainJob

HALF = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("optimizer")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "moe", 4)
    write_tiny(home / "dense", 1)
    write_tiny(home / "tied", 2, tied=True)
    return home


def make(home: Path, directory: Path, model: str, **recipe: object) -> TrainJob:
    constant = Optimizer(lr=3e-3, batch_tokens=BATCH * L, schedule="constant", warmup=0.0, weight_decay=0.1)
    optimizer = constant.model_copy(update=recipe)
    return TrainJob(
        stage="seed",
        name="seed",
        model=home / model,
        packed_dirs=(home / "shard",),
        output=directory / "out",
        checkpoints=directory / "steps",
        steps=2 * HALF,
        sequence_length=L,
        optimizer=optimizer,
        checkpoint_every=100,
        seed=5,
        with_optimizer_state=True,
    )


def opened(directory: Path) -> OptimizerState:
    found = open_optimizer_state(directory)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "recipe"), [("dense", {}), ("tied", {"precision": "pure_bf16"}), ("moe", {"name": "muon"})]
)
def test_two_trainings_that_pass_them_on_are_one(
    home: Path, tmp_path: Path, model: str, recipe: dict[str, str]
) -> None:
    whole = make(home, tmp_path, model, **recipe)
    losses = run(whole).losses
    first = variant(whole, "first", steps=HALF)
    second = variant(
        whole,
        "second",
        steps=HALF,
        model=first.output,
        optimizer_state=first.output / OPTIMIZER_FOLDER,
        skip=Skip(start=0, width=HALF),
    )
    assert run(first).losses + run(second).losses == losses
    check_same(weights(second.output), weights(whole.output))
    ours, theirs = opened(second.output / OPTIMIZER_FOLDER), opened(whole.output / OPTIMIZER_FOLDER)
    assert ours.steps == theirs.steps == 2 * HALF
    for kind in KINDS:
        check_same(ours.tensors[kind], theirs.tensors[kind])


def test_without_them_the_second_is_another(home: Path, tmp_path: Path) -> None:
    whole = make(home, tmp_path, "moe")
    first = variant(whole, "first", steps=HALF)
    second = variant(whole, "second", steps=HALF, model=first.output, skip=Skip(start=0, width=HALF))
    assert run(first).losses + run(second).losses != run(whole).losses


def test_a_training_that_resumes_does_not_begin_with_them_again(home: Path, tmp_path: Path) -> None:
    first = make(home, tmp_path, "moe")
    run(first)
    second = variant(
        first, "second", model=first.output, optimizer_state=first.output / OPTIMIZER_FOLDER, checkpoint_every=HALF
    )
    losses = run(second).losses
    short = variant(second, "again", steps=HALF)
    run(short)
    again = run(dataclasses.replace(short, steps=2 * HALF))
    assert again.restored_step == HALF
    assert again.losses == losses
    check_same(weights(short.output), weights(second.output))


def test_a_router_that_did_not_learn_has_none(home: Path, tmp_path: Path) -> None:
    job = make(home, tmp_path, "dense")
    run(job)
    names = ModelMap("qwen3_moe")
    shapes = canonical_shapes(read_config(job.output))
    for kind in KINDS:
        found = opened(job.output / OPTIMIZER_FOLDER).tensors[kind]
        assert {key: tuple(tensor.shape) for key, tensor in found.items()} == shapes
        for key, tensor in found.items():
            assert bool(tensor.any()) is (names.classify(key).role is not Role.ROUTER)


def test_another_models_are_refused(home: Path, tmp_path: Path) -> None:
    job = make(home, tmp_path, "dense")
    run(job)
    with pytest.raises(CheckpointError, match=r"another model's"):
        run(variant(job, "moe", model=home / "moe", optimizer_state=job.output / OPTIMIZER_FOLDER))
    with pytest.raises(CheckpointError, match="does not exist"):
        run(variant(job, "nothing", optimizer_state=tmp_path / "nothing"))


# --- merged


def filled(directory: Path, model: Path, value: float, steps: int) -> Path:
    """A sub-model that has only an optimizer state, all of one value."""
    config = read_config(model)

    def tensors(kind: Kind) -> Iterator[tuple[str, torch.Tensor]]:
        power = 1 + KINDS.index(kind)
        return ((key, torch.full(shape, value**power)) for key, shape in canonical_shapes(config).items())

    write_optimizer_state(directory / OPTIMIZER_FOLDER, tensors, steps, config)
    return directory


def test_experts_keep_theirs_and_the_backbone_has_the_weighted_mean(home: Path, tmp_path: Path) -> None:
    values, gammas = (1.0, -2.0, 3.0, 5.0), (0.1, 0.2, 0.3, 0.4)
    parts = [filled(tmp_path / str(k), home / "dense", value, 10 + k) for k, value in enumerate(values)]
    config = read_config(home / "moe")
    assert merge_optimizer_states(parts, config, gammas, tmp_path)
    merged, names = opened(tmp_path / OPTIMIZER_FOLDER), ModelMap("qwen3_moe")
    assert merged.steps == 10
    for power, kind in enumerate(KINDS, start=1):
        mean = sum(gamma * value**power for gamma, value in zip(gammas, values, strict=True))
        found = merged.tensors[kind]
        assert {key: tuple(tensor.shape) for key, tensor in found.items()} == canonical_shapes(config)
        for key, tensor in found.items():
            role = names.classify(key)
            if role.expert is not None:
                torch.testing.assert_close(tensor, torch.full_like(tensor, values[role.expert] ** power))
            elif role.role is Role.ROUTER:
                torch.testing.assert_close(tensor, torch.tensor([[v**power] for v in values]).expand_as(tensor))
            else:
                torch.testing.assert_close(tensor, torch.full_like(tensor, mean))


def test_one_that_was_never_trained_makes_nobody_begin_again(home: Path, tmp_path: Path) -> None:
    parts = [
        filled(tmp_path / str(k), home / "dense", value, steps)
        for k, (value, steps) in enumerate([(1.0, 40), (0.0, 0)])
    ]
    assert merge_optimizer_states(parts, read_config(home / "moe") | {"num_experts": 2}, (1.0, 0.0), tmp_path)
    assert opened(tmp_path / OPTIMIZER_FOLDER).steps == 40


def test_a_mean_of_squares_is_never_below_zero(home: Path, tmp_path: Path) -> None:
    parts = [filled(tmp_path / str(k), home / "dense", value, 1) for k, value in enumerate((1e-19, 3.0, 1e-3))]
    config = read_config(home / "moe") | {"num_experts": 3}
    merge_optimizer_states(parts, config, (1 / 3, 1 / 3, 1 / 3), tmp_path)
    assert all(
        bool((tensor >= 0).all()) for tensor in opened(tmp_path / OPTIMIZER_FOLDER).tensors["exp_avg_sq"].values()
    )


def test_where_one_has_none_there_are_none(home: Path, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    parts = [filled(tmp_path / "0", home / "dense", 1.0, 1), tmp_path / "1"]
    assert not merge_optimizer_states(parts, read_config(home / "moe"), (0.5, 0.5), tmp_path)
    assert open_optimizer_state(tmp_path / OPTIMIZER_FOLDER) is None


# --- through a run


def finished(tmp_path: Path, tokens: dict[str, float], **changes: bool) -> Path:
    config = small_config(tmp_path / "runs", tokens=tokens)
    raw = config.model_dump(mode="json")
    for path, value in changes.items():
        put(raw, path.replace("__", "."), value)
    return pipeline.run(type(config).model_validate(raw), backend=OneCorpus())


@pytest.mark.slow
def test_a_run_passes_them_on_twice(tmp_path: Path) -> None:
    tokens = {"total": 24_000, "seed_share": 0.4, "finetune_share": 0.3}
    kept = finished(tmp_path / "kept", tokens)
    seed = opened(kept / "seed" / OPTIMIZER_FOLDER)
    submodels = [opened(path / OPTIMIZER_FOLDER) for path in sorted((kept / "submodels").iterdir()) if path.is_dir()]
    assert all(submodel.steps > seed.steps for submodel in submodels)
    assert opened(kept / "merged" / OPTIMIZER_FOLDER).steps == min(submodel.steps for submodel in submodels)
    assert not list((kept / "model").rglob("exp_avg*")), "a finished model has nothing of its training"

    for part in sorted((kept / "decomposed").glob("[0-9]*")):
        # Sub-models begin as the seed ended; the row of a lone expert's router has learnt nothing.
        ours, theirs = weights(part), weights(kept / "seed")
        assert all(
            same_bits(ours[key], theirs[key])
            for key in theirs
            if ModelMap("qwen3_moe").classify(key).role is not Role.ROUTER
        )

    fresh = finished(
        tmp_path / "fresh", tokens, submodels__keep_optimizer_state=False, finetune__keep_optimizer_state=False
    )
    same = [read_manifest(run / "seed").summary["units"][0]["loss"] for run in (kept, fresh)]
    assert same[0] == same[1]
    assert opened(fresh / "submodels" / "0" / OPTIMIZER_FOLDER).steps < submodels[0].steps
    assert open_optimizer_state(fresh / "merged" / OPTIMIZER_FOLDER) is None


def test_an_upcycled_seeds_go_to_all_its_copies(tmp_path: Path) -> None:
    directory = finished(tmp_path, {"total": 24_000, "seed_share": 0.5, "finetune_share": 0.5})
    seed, whole = opened(directory / "seed" / OPTIMIZER_FOLDER), opened(directory / "merged" / OPTIMIZER_FOLDER)
    names = ModelMap(open_checkpoint(directory / "merged").model_map.family.name)
    assert whole.steps == seed.steps
    for kind in KINDS:
        for key, tensor in whole.tensors[kind].items():
            role = names.classify(key)
            if role.role is Role.ROUTER:
                assert not tensor.any()
            else:
                source = key if role.expert is None else names.renumbered(key, 0)
                assert same_bits(tensor, seed.tensors[kind][source])
