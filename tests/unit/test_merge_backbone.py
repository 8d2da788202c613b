"""The mean of the sub-models' backbones against a reference in plain Python."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import model_map, random_tensors, tiny_config

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models import Role, differences
from moedisco_ray.stages.merge import backbone
from moedisco_ray.stages.merge.backbone import combine
from moedisco_ray.stages.merge.tensors import merge


def copies_of(seed, count=3, size=40, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator).to(dtype)
    return start, [start + 0.3 * torch.randn(size, generator=generator).to(dtype) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_the_mean_weighs_deltas_from_the_start_and_is_rounded_once(seed, count, dtype, data):
    start, copies = copies_of(seed, count, dtype=dtype)
    parts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    weights = [part / sum(parts) for part in parts]
    merged, _ = combine("x", copies, start, weights)
    expected = []
    for first, *values in zip(start.tolist(), *(copy.tolist() for copy in copies), strict=True):
        deltas = [value - first for value in values]
        expected.append(first + sum(map(operator.mul, weights, deltas)))
    assert merged.dtype == dtype
    exact = torch.tensor(expected, dtype=torch.float64)
    assert float((merged.double() - exact).abs().max()) <= torch.finfo(dtype).eps * float(exact.abs().max())
    assert (merged == exact.to(dtype)).double().mean() > 0.95  # sums in another order may round to the neighbour


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    start, copies = copies_of(3, size=101)
    whole, deviation = combine("x", copies, start, (0.2, 0.3, 0.5))
    monkeypatch.setattr(backbone, "CHUNK", 7)
    pieces, same = combine("x", copies, start, (0.2, 0.3, 0.5))
    assert torch.equal(whole, pieces)
    assert deviation == pytest.approx(same, rel=1e-12)


def test_what_did_not_change_comes_out_bit_for_bit():
    start, _ = copies_of(5)
    merged, deviation = combine("x", [start, start.clone()], start, (0.3, 0.7))
    assert torch.equal(merged, start)
    assert deviation is None


def test_a_start_of_another_shape_is_an_error():
    start, copies = copies_of(6)
    with pytest.raises(CheckpointError, match="another shape or type"):
        combine("x", copies, start[1:], (0.3, 0.3, 0.4))


def test_weights_change_the_backbone_alone():
    config = tiny_config("mixtral", 4)
    parts = [random_tensors(tiny_config("mixtral", 2), seed=k) for k in range(2)]

    def merged(*weights):
        return {report.key: tensor for tensor, report in merge(parts, parts[0], model_map(config), weights)}

    even, uneven = merged(0.5, 0.5), merged(0.25, 0.75)
    assert {model_map(config).classify(key).role for key in differences(even, uneven)} == {Role.BACKBONE}
