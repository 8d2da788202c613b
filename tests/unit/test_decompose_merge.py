from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import LENGTH, VOCAB, model_map, moe, random_tensors, tiny_config

from moedisco_ray.core.config import FAMILIES
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS, PARTS
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.models import (
    Role,
    canonical_shapes,
    check_same,
    differences,
    expert_count,
    load_model,
    model_tensors,
    open_checkpoint,
    random_weights,
    runnable,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.models.initial_weights import with_seed
from moedisco_ray.stages.decompose import decompose, write_submodels
from moedisco_ray.stages.merge.backbone import merge_weights
from moedisco_ray.stages.merge.tensors import merge


class Recording(Mapping):
    """A mapping that counts what is read from it."""

    def __init__(self, tensors):
        self.tensors, self.reads = tensors, Counter()

    def __getitem__(self, key):
        self.reads[key] += 1
        return self.tensors[key]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def slices(config, tensors, clusters):
    count = expert_count(config)
    return [dict(decompose(tensors, model_map(config), count, clusters, k)) for k in range(clusters)]


def uniform(clusters):
    return merge_weights("uniform", [1] * clusters)


def joined(parts, names, start=None):
    """The uniform merge of sub-models; the first one stands for their start."""
    for tensor, report in merge(parts, start or parts[0], names, uniform(len(parts))):
        yield report.key, tensor


def expert(config, layer, index, part):
    return model_map(config).expert_key(layer, index, part)


@settings(max_examples=60, deadline=None)
@given(moe(), st.data())
def test_merge_of_decompose_is_bitwise_the_identity(case, data):
    config, tensors, clusters = case
    parts = data.draw(st.lists(st.integers(1, 9), min_size=clusters, max_size=clusters))
    recorded = [Recording(part) for part in slices(config, tensors, clusters)]
    weights = merge_weights("token_weighted", parts)
    merged = list(merge(recorded, dict(recorded[0].tensors), model_map(config), weights))
    check_same({report.key: tensor for tensor, report in merged}, tensors)
    assert len(merged) == len(tensors)
    assert all(set(part.reads) == set(part.tensors) and set(part.reads.values()) == {1} for part in recorded)


@settings(max_examples=25, deadline=None)
@given(moe())
def test_a_submodel_has_the_tensors_of_its_configuration(case):
    config, tensors, clusters = case
    values = submodel_config(config, expert_count(config) // clusters)
    for part in slices(config, tensors, clusters):
        assert {key: tuple(tensor.shape) for key, tensor in part.items()} == canonical_shapes(values)


@settings(max_examples=40, deadline=None)
@given(moe(), st.randoms(use_true_random=False))
def test_permuted_experts_give_permuted_submodels(case, random):
    config, tensors, clusters = case
    names, count = model_map(config), expert_count(config)
    order = list(range(count))
    random.shuffle(order)
    permuted = dict(tensors)
    for key in tensors:
        role = names.classify(key)
        if role.expert_axis is not None:
            permuted[key] = tensors[key].index_select(role.expert_axis, torch.tensor(order))
        elif role.expert is not None:
            permuted[key] = tensors[names.renumbered(key, order[role.expert])]
    before, after = slices(config, tensors, clusters), slices(config, permuted, clusters)
    group = count // clusters
    for key in tensors:
        role = names.classify(key)
        if role.expert is None:
            continue
        (new, new_index), (old, old_index) = divmod(role.expert, group), divmod(order[role.expert], group)
        assert torch.equal(after[new][names.renumbered(key, new_index)], before[old][names.renumbered(key, old_index)])
        rows = names.router_key(role.layer)
        assert torch.equal(after[new][rows][new_index], before[old][rows][old_index])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_catches_a_merge_that_swaps_experts_or_skips_a_key(family):
    config = tiny_config(family)
    tensors = random_tensors(config)
    merged = dict(joined(slices(config, tensors, 2), model_map(config)))
    check_same(merged, tensors)
    for name in DECLARATIONS[family].stacks:
        key = model_map(config).block_key(0, f"experts.{name}")
        assert differences(merged | {key: merged[key][[3, 1, 2, 0]]}, tensors) == [key]
    for part in () if DECLARATIONS[family].stacks else PARTS:
        one, two = expert(config, 0, 0, part), expert(config, 0, 3, part)
        swapped = merged | {one: merged[two], two: merged[one]}
        assert differences(swapped, tensors) == sorted([one, two])
    for key in merged:
        with pytest.raises(CheckpointError):
            check_same({name: tensor for name, tensor in merged.items() if name != key}, tensors)
    rows = model_map(config).router_key(1)
    with pytest.raises(CheckpointError, match="differs"):
        check_same(merged | {rows: merged[rows].flip(0)}, tensors)


def test_a_submodel_is_sliced_without_reading_other_experts():
    config = tiny_config("qwen2_moe", 6)
    source = Recording(random_tensors(config))
    part = dict(decompose(source, model_map(config), 6, 3, 1))
    read = [model_map(config).classify(key) for key in source.reads]
    assert {role.expert for role in read if role.role is Role.EXPERT} == {2, 3}
    assert set(source.reads.values()) == {1}
    assert len(part) == len(source.reads)
    rows = model_map(config).router_key(0)
    assert part[rows].untyped_storage().nbytes() == part[rows].nbytes


def test_slicing_and_merging_hold_one_tensor_at_a_time():
    config = tiny_config("mixtral", 8, num_hidden_layers=4)
    count, peak, live = expert_count(config), [0], set()

    class Fresh(Recording):
        def __getitem__(self, key):
            tensor = super().__getitem__(key).clone()
            token = (id(self), key)
            live.add(token)
            peak[0] = max(peak[0], len(live))
            weakref.finalize(tensor, live.discard, token)
            return tensor

    source = Fresh(random_tensors(config))
    for _ in decompose(source, model_map(config), count, 4, 2):
        pass
    assert peak[0] <= 2
    peak[0] = 0
    parts = [Fresh(part) for part in slices(config, dict(source.tensors), 4)]
    for _ in joined(parts, model_map(config)):
        pass
    assert peak[0] <= 2 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_submodels_on_disk_load_and_merge_back(family, tmp_path):
    config = tiny_config(family)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "whole", tensors.items(), config)
    whole = open_checkpoint(tmp_path / "whole")
    sizes = write_submodels(whole, whole.config, 4, tmp_path / "parts", max_shard_bytes=4000)
    assert len(sizes) == 4
    models = [runnable(load_model(tmp_path / "parts" / str(k))) for k in range(4)]
    assert {model.config.num_experts_per_tok for model in models} == {1}
    assert all(torch.isfinite(model(torch.arange(LENGTH)[None] % VOCAB).logits).all() for model in models)
    opened = [open_checkpoint(tmp_path / "parts" / str(k)) for k in range(4)]
    check_same(dict(joined(opened, model_map(config))), tensors)


def test_sixty_submodels_take_little_more_space_than_the_model_and_can_be_moved(tmp_path):
    """The structure of Qwen1.5-MoE: 60 routed experts, a shared one four times as wide, small widths."""
    config = tiny_config(
        "qwen2_moe", 60, hidden_size=128, moe_intermediate_size=64, shared_expert_intermediate_size=256
    )
    tensors = random_tensors(config, torch.bfloat16)
    write_submodels(tensors, config, 60, tmp_path / "draft")
    source = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(path.stat().st_size for path in (tmp_path / "draft").rglob("*") if path.is_file()) < 1.2 * source
    (tmp_path / "draft").rename(tmp_path / "decomposed")
    model = load_model(tmp_path / "decomposed" / "59", torch.bfloat16)
    check_same(dict(model_tensors(model)), dict(decompose(tensors, model_map(config), 60, 60, 59)))


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "../backbone/../x.safetensors", "../backbone/sub/x.safetensors"]
)
def test_an_index_names_no_file_but_its_own_and_the_backbones(tmp_path, name):
    config = tiny_config("olmoe")
    write_submodels(random_tensors(config), config, 2, tmp_path)
    index = tmp_path / "1" / "model.safetensors.index.json"
    values = read_json(index)
    values["weight_map"]["model.norm.weight"] = name
    write_json(index, values)
    for load in (open_checkpoint, load_model):
        with pytest.raises(CheckpointError, match="outside its directory"):
            load(tmp_path / "1")


@settings(max_examples=20, deadline=None)
@given(moe(), st.data())
def test_the_backbone_is_the_weighted_mean(case, data):
    config, tensors, clusters = case
    tokens = data.draw(st.lists(st.integers(1, 1000), min_size=clusters, max_size=clusters))
    weights = merge_weights("token_weighted", tokens)
    assert sum(weights) == pytest.approx(1)
    parts = slices(config, tensors, clusters)
    start = dict(parts[0])
    for k, part in enumerate(parts):
        generator = torch.Generator().manual_seed(k)
        for key, tensor in part.items():
            if model_map(config).classify(key).role in (Role.BACKBONE, Role.SHARED_EXPERT):
                part[key] = tensor + torch.randn(tensor.shape, generator=generator).to(tensor)
    reports = {}
    for tensor, report in merge(parts, start, model_map(config), weights):
        reports[report.key] = report
        if report.role in (Role.BACKBONE, Role.SHARED_EXPERT):
            expected = sum(w * part[report.key].double() for w, part in zip(weights, parts, strict=True))
            torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=0 if clusters == 1 else 1e-6, atol=1e-12)
            assert report.rule == ("identical" if clusters == 1 else "combined")
            distance = max(float((part[report.key].double() - expected).norm() / expected.norm()) for part in parts)
            assert report.deviation == pytest.approx(distance if clusters > 1 else 0.0, rel=1e-9)
            assert report.submodels == tuple(range(clusters))
    group = expert_count(config) // clusters
    for key, report in reports.items():
        role = model_map(config).classify(key)
        if role.role is Role.EXPERT and role.expert is None:  # a stack of all experts
            assert (report.rule, report.submodels) == ("concatenated", tuple(range(clusters)))
        elif role.role is Role.EXPERT:
            assert (report.rule, report.submodels, report.deviation) == ("copied", (role.expert // group,), 0.0)
    assert reports.keys() == tensors.keys()


def test_merge_weights_follow_the_rule():
    assert merge_weights("uniform", [1, 3]) == (0.5, 0.5)
    assert merge_weights("token_weighted", [1, 3]) == (0.25, 0.75)
    assert merge_weights("token_weighted", [0, 0]) == merge_weights("uniform", [0, 0]) == (0.5, 0.5)


@pytest.mark.parametrize("rule", ["uniform", "token_weighted"])
def test_who_was_trained_on_nothing_has_no_say(rule):
    assert merge_weights(rule, [2, 0, 2]) == (0.5, 0.0, 0.5)


def test_what_does_not_fit_is_an_error():
    config = tiny_config("qwen3_moe")
    tensors, names = random_tensors(config), model_map(config)
    parts = slices(config, tensors, 2)
    unknown = {"model.layers.0.mlp.extra.weight": torch.ones(1)}
    with pytest.raises(CheckpointError, match="is no tensor of family"):
        list(decompose(tensors | unknown, names, 4, 2, 0))
    with pytest.raises(CheckpointError, match="is no tensor of family"):
        list(joined([part | unknown for part in parts], names))
    with pytest.raises(CheckpointError, match="only in one"):
        list(joined([parts[0], parts[1] | unknown], names))
    with pytest.raises(CheckpointError, match="another shape or type"):
        list(joined([parts[0], parts[1] | {"model.norm.weight": torch.ones(3)}], names))
    with pytest.raises(CheckpointError, match="one row per expert"):
        list(joined([parts[0], parts[1] | {names.router_key(0): torch.ones(1, 16)}], names))
    with pytest.raises(CheckpointError, match="weights"):
        list(merge(parts, parts[0], names, (1.0,)))
    with pytest.raises(CheckpointError, match="is not in the backbone that all sub-models started from"):
        list(joined(parts, names, {key: tensor for key, tensor in parts[0].items() if key != "model.norm.weight"}))
    backbone = {key: tensor for key, tensor in parts[0].items() if names.classify(key).role is Role.BACKBONE}
    assert list(joined(parts, names, backbone))  # what they had in common when they last met
    with pytest.raises(ConfigError, match="does not divide"):
        list(decompose(tensors, names, 4, 3, 0))
    with pytest.raises(CheckpointError, match="4 experts, but the configuration says 8"):
        list(decompose(tensors, names, 8, 2, 0))
    with pytest.raises(CheckpointError, match="rows for 4 experts"):
        list(decompose(tensors | {names.router_key(0): torch.ones(3, 16)}, names, 4, 2, 0))


@pytest.mark.parametrize(
    "lost", ["model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight", "lm_head.weight"]
)
def test_an_incomplete_model_is_not_sliced(lost, tmp_path):
    config = tiny_config("qwen3_moe")
    tensors = random_tensors(config)
    del tensors[lost]
    with pytest.raises(CheckpointError, match="missing"):
        write_submodels(tensors, config, 2, tmp_path)


@pytest.mark.parametrize("group", [1, 2])
def test_a_moe_grown_from_a_seed_gives_the_seed_back(group):
    config = tiny_config("qwen2_moe", 4)
    seed_config = submodel_config(config, group)
    seed = random_tensors(seed_config, seed=5)
    initial = random_weights(config, 1)
    names = model_map(config)
    whole = with_seed(seed, initial, names)
    assert list(whole) == list(initial)
    assert {key: tuple(whole[key].shape) for key in whole} == canonical_shapes(config)
    for part in slices(config, whole, 4 // group):
        odd = differences(part, seed)
        assert odd == ([] if group > 1 else [names.router_key(0), names.router_key(1)])
    if group == 1:
        assert torch.equal(whole[names.router_key(0)], initial[names.router_key(0)])


def test_noise_on_the_router_rows_tells_copies_of_an_expert_apart():
    config = tiny_config("qwen2_moe", 4)
    seed, initial, names = (
        random_tensors(submodel_config(config, 2), seed=5),
        random_weights(config, 1),
        model_map(config),
    )
    whole = with_seed(seed, initial, names, distinct_rows=True)
    kept = with_seed(seed, initial, names)
    zeros = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in initial.items()}
    state = with_seed(seed, zeros, names, distinct_rows=True)  # an optimizer state has no noise
    for key in whole:
        assert torch.equal(state[key], kept[key])
        if names.classify(key).role is not Role.ROUTER:
            assert torch.equal(whole[key], kept[key])
            continue
        first, second = whole[key].split(2)
        assert torch.equal(first, seed[key])
        noise = 0.1 * seed[key].std() * initial[key][2:] / initial[key].std()
        torch.testing.assert_close(second, seed[key] + noise)


def test_a_seed_of_another_architecture_is_an_error():
    config = tiny_config("qwen3_moe", 4)
    seed = random_tensors(submodel_config(config, 1))
    del seed["model.norm.weight"]
    with pytest.raises(CheckpointError, match="missing"):
        with_seed(seed, random_weights(config, 1), model_map(config))


def test_a_random_submodel_equals_the_slice_of_the_random_moe():
    config = tiny_config("mixtral", 4)
    source = random_weights(config, 9)
    part = dict(decompose(source, model_map(config), 4, 4, 2))
    key = expert(config, 1, 2, "down")
    assert torch.equal(part[expert(config, 1, 0, "down")], random_weights(config, 9)[key])
