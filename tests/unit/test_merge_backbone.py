"""Rules for the backbone against references that follow their papers element by element, in plain Python."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import LENGTH, VOCAB, model_map, random_tensors, tiny_config

from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.config import Merge
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import Role, differences, load_model, open_checkpoint, write_checkpoint
from moedisco_ray.stages.decompose import write_submodels
from moedisco_ray.stages.merge import backbone
from moedisco_ray.stages.merge.backbone import Recipe, combine, merge_weights, recipes
from moedisco_ray.stages.merge.build import build_merged
from moedisco_ray.stages.merge.calibrate import RouterSettings
from moedisco_ray.stages.merge.choose import Candidate, best
from moedisco_ray.stages.merge.tensors import merge


def copies_of(seed, count=3, size=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator).to(dtype)
    return start, [start + 0.3 * torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


def deltas_of(start, copies):
    return [[float(value) - float(first) for value, first in zip(copy, start, strict=True)] for copy in copies]


def ties_reference(start, copies, weights, keep, scale):
    """Yadav et al. 2023, algorithm 1, with weights in its sums."""
    deltas = deltas_of(start, copies)
    trimmed = []
    for delta in deltas:
        largest = sorted(range(len(delta)), key=lambda i: -abs(delta[i]))[: math.ceil(keep * len(delta))]
        trimmed.append([value if i in largest else 0.0 for i, value in enumerate(delta)])
    merged = []
    for i, first in enumerate(start.tolist()):
        column = [(weight, delta[i]) for weight, delta in zip(weights, trimmed, strict=True)]
        elected = math.copysign(1, sum(weight * value for weight, value in column))
        agreeing = [(weight, value) for weight, value in column if value * elected > 0]
        share = sum(weight for weight, _ in agreeing)
        merged.append(first + scale * (sum(weight * value for weight, value in agreeing) / share if share else 0.0))
    return merged


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.floats(0.05, 1.0), st.floats(0.3, 2.0), st.data())
def test_ties_follows_its_paper(seed, count, keep, scale, data):
    start, copies = copies_of(seed, count)
    parts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    weights = tuple(part / sum(parts) for part in parts)
    merged, _ = combine("x", copies, start, Recipe("ties", weights, scale, keep=keep))
    expected = ties_reference(start, copies, weights, keep, scale)
    torch.testing.assert_close(merged, torch.tensor(expected, dtype=torch.float64).float(), rtol=1e-6, atol=1e-7)


def test_ties_by_hand():
    start = torch.tensor([1.0, 1.0, 1.0, 1.0])
    copies = [start + torch.tensor([4.0, -3.0, 0.1, 0.0]), start + torch.tensor([2.0, 5.0, 0.0, 0.1])]
    merged, _ = combine("x", copies, start, Recipe("ties", (0.5, 0.5), keep=0.5))
    assert merged.tolist() == [1 + 3, 1 + 5, 1, 1]      # signs agree; +5 beats -3; trimmed; trimmed


def test_ties_that_keeps_all_of_agreeing_deltas_is_the_mean():
    start, copies = copies_of(1)
    copies = [start + (copy - start).abs() for copy in copies]
    weights = (0.2, 0.3, 0.5)
    ties, mean = (combine("x", copies, start, Recipe(rule, weights, keep=1.0))[0] for rule in ("ties", "token_weighted"))
    torch.testing.assert_close(ties, mean)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.9])
def test_dare_follows_its_paper(drop):
    start, copies = copies_of(2, size=50)
    merged, _ = combine("a.name", copies, start, Recipe("dare", (0.5, 0.25, 0.25), 1.5, drop=drop, seed=7))
    expected = start.double()
    for k, (weight, delta) in enumerate(zip((0.5, 0.25, 0.25), deltas_of(start, copies), strict=True)):
        name = int.from_bytes(hashlib.blake2b(f"a.name {k}".encode(), digest_size=8).digest(), "big")
        uniform = np.random.Generator(np.random.Philox(key=[7, name])).random(50)
        kept = [value / (1 - drop) if u >= drop else 0.0 for value, u in zip(delta, uniform, strict=True)]
        expected = expected + 1.5 * weight * torch.tensor(kept, dtype=torch.float64)
    torch.testing.assert_close(merged, expected.float())


def test_dare_keeps_its_share_and_the_mean_of_a_delta():
    start = torch.zeros(200_000)
    copies = [torch.ones(200_000), 2 * torch.ones(200_000)]
    merged, _ = combine("x", copies, start, Recipe("dare", (0.5, 0.5), drop=0.8, seed=1))
    assert float(merged.mean()) == pytest.approx(1.5, rel=0.02)
    assert float((merged != 0).float().mean()) == pytest.approx(1 - 0.8**2, abs=0.01)
    assert set(merged.unique().tolist()) == {0.0, 2.5, 5.0, 7.5}
    other, _ = combine("y", copies, start, Recipe("dare", (0.5, 0.5), drop=0.8, seed=1))
    assert not torch.equal(merged, other)


@pytest.mark.parametrize("rule", backbone.RULES)
def test_the_size_of_a_chunk_changes_nothing(rule, monkeypatch):
    start, copies = copies_of(3, size=101)
    recipe = Recipe(rule, (0.2, 0.3, 0.5), 0.8, seed=5)
    whole, deviation = combine("x", copies, start, recipe)
    monkeypatch.setattr(backbone, "_CHUNK", 7)
    pieces, same = combine("x", copies, start, recipe)
    assert torch.equal(whole, pieces)
    assert deviation == pytest.approx(same, rel=1e-12)


@pytest.mark.parametrize("rule", backbone.RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_moves_along_the_line_from_the_start_and_is_rounded_once(rule, dtype):
    start, copies = copies_of(4, dtype=dtype)
    weights = (0.25, 0.25, 0.5)
    plain, double = (
        combine("x", [copy.double() for copy in copies], start.double(), Recipe(rule, weights, scale))[0] for scale in (1.0, 2.0))
    torch.testing.assert_close(double - start.double(), 2 * (plain - start.double()))
    stored, _ = combine("x", copies, start, Recipe(rule, weights, 2.0))
    assert stored.dtype == dtype
    assert torch.equal(stored, double.to(dtype))


def test_what_did_not_change_comes_out_bit_for_bit():
    start, _ = copies_of(5)
    for rule in backbone.RULES:
        merged, deviation = combine("x", [start, start.clone()], start, Recipe(rule, (0.5, 0.5), 3.0))
        assert torch.equal(merged, start)
        assert deviation is None


def test_a_start_of_another_shape_is_an_error():
    start, copies = copies_of(6)
    with pytest.raises(CheckpointError, match="another shape or type"):
        combine("x", copies, start[1:], Recipe("uniform", (0.3, 0.3, 0.4)))


def test_the_configuration_allows_one_recipe_or_all():
    tokens = [1, 3]
    one, = recipes(Merge(backbone="ties"), tokens, 9)
    assert one == Recipe("ties", (0.5, 0.5), 1.0, seed=9)
    several = recipes(Merge(backbone="auto"), tokens, 0)
    assert [(recipe.rule, recipe.scale) for recipe in several] == [
        (rule, scale) for rule in backbone.RULES for scale in backbone.SCALES]
    assert {recipe.weights for recipe in several if recipe.rule == "token_weighted"} == {(0.25, 0.75)}
    assert merge_weights("dare", tokens) == (0.5, 0.5)
    assert recipes(Merge(backbone="auto"), [7], 0) == [Recipe("uniform", (1.0,))]


def test_the_first_of_equal_losses_is_chosen():
    options = [Recipe(rule, (1.0,)) for rule in ("uniform", "ties", "dare")]
    candidates = [Candidate(option, loss) for option, loss in zip(options, (3.0, 2.0, 2.0), strict=True)]
    assert best(candidates).rule == "ties"


def trained(config, path):
    """A start and sub-models whose backbones went different ways from it."""
    write_submodels(random_tensors(config, seed=2), config, 2, path / "start")
    generator = torch.Generator().manual_seed(0)
    parts = []
    for k in range(2):
        tensors = dict(open_checkpoint(path / "start" / str(k)))
        moved = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            if model_map(config).classify(key).role is not Role.ROUTER else tensor for key, tensor in tensors.items()}
        write_checkpoint(path / str(k), moved.items(), open_checkpoint(path / "start" / str(k)).config)
        parts.append(path / str(k))
    return path / "start" / "0", parts


@pytest.mark.parametrize("tied", [True, False])
def test_auto_measures_every_candidates_own_model_and_writes_the_best(tied, tmp_path):
    config = tiny_config("qwen2_moe", 4, tie_word_embeddings=tied, norm_topk_prob=False)
    start, parts = trained(config, tmp_path)
    random = np.random.default_rng(0)
    data = [(random.integers(0, VOCAB, (8, LENGTH)), np.arange(8) % 2)]
    tokens = torch.as_tensor(random.integers(0, VOCAB, (8, LENGTH)))

    def loss(model):
        with torch.no_grad():
            return float(model(tokens, labels=tokens).loss)

    options = recipes(Merge(backbone="auto"), [1, 3], 0)
    router = RouterSettings("ridge")
    report = build_merged(parts, start, config, options, data, directory=tmp_path / "auto", router=router, loss=loss)
    alone = []
    for i, option in enumerate(options):
        build_merged(parts, start, config, [option], data, directory=tmp_path / f"alone-{i}", router=router, loss=loss)
        alone.append(loss(load_model(tmp_path / f"alone-{i}").eval()))
    assert [entry["loss"] for entry in report["candidates"]] == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == len(options)
    chosen = int(np.argmin(alone))
    assert report["backbone"] == options[chosen].to_dict()
    assert differences(open_checkpoint(tmp_path / "auto"), open_checkpoint(tmp_path / f"alone-{chosen}")) == []
    assert read_json(tmp_path / "auto/merge.json") == report
    assert sorted(path.name for path in (tmp_path / "auto").iterdir()) == ["config.json", "merge.json", "model.safetensors"]


def test_a_merge_with_a_rule_streams_and_leaves_experts_alone(tmp_path):
    config = tiny_config("mixtral", 4)
    start, parts = trained(config, tmp_path)
    opened = [open_checkpoint(part) for part in parts]
    plain, ties = (
        dict(merge(opened, open_checkpoint(start), model_map(config), Recipe(rule, (0.5, 0.5)))) for rule in ("uniform", "ties"))
    roles = {model_map(config).classify(key).role for key in differences(plain, ties)}
    assert roles == {Role.BACKBONE}
