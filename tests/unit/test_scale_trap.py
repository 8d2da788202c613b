"""Routers of the merged model, and the scale trap: experts trained at weight 1 must not be used at less."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from moe_models import LENGTH, VOCAB, model_map, random_tensors, tiny_config
from sklearn.linear_model import Ridge

from moedisco_ray.core.config import FAMILIES
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.models import (
    ModelMap,
    differences,
    load_model,
    moe_blocks,
    open_checkpoint,
    random_weights,
    routers,
    runnable,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.models.initial_weights import with_seed
from moedisco_ray.stages.decompose import write_submodels
from moedisco_ray.stages.merge import build, calibrate
from moedisco_ray.stages.merge.backbone import merge_weights
from moedisco_ray.stages.merge.build import build_merged
from moedisco_ray.stages.merge.calibrate import RouterSettings, calibrated
from moedisco_ray.stages.merge.router_init import ridge_strength, statistics
from moedisco_ray.stages.merge.tensors import merge

CLUSTERS = 4
SCALED = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")
NORMALISED = tuple(family for family in FAMILIES if DECLARATIONS[family].router.normalises != "never")


def batches(documents=24, seed=0):
    """Documents whose tokens come from their cluster's own quarter of the vocabulary, in two batches."""
    random = np.random.Generator(np.random.Philox(key=seed))
    cluster = np.arange(documents) % CLUSTERS
    tokens = random.integers(0, VOCAB // CLUSTERS, (documents, LENGTH)) + cluster[:, None] * (VOCAB // CLUSTERS)
    half = documents // 2
    return [(tokens[:half], cluster[:half]), (tokens[half:], cluster[half:])]


def experts_of_one_seed(config, group, path):
    """Sub-models that all equal one seed, on disk."""
    seed = {
        key: tensor * (1.0 if key.endswith("norm.weight") else 0.3)
        for key, tensor in random_tensors(submodel_config(config, group), seed=3).items()
    }
    whole = with_seed(seed, random_weights(config, 1), model_map(config))
    return submodels(whole, config, expert_total(config) // group, path)


def submodels(whole, config, clusters, path):
    write_submodels(whole, config, clusters, path)
    return [path / str(k) for k in range(clusters)]


def expert_total(config):
    return config[ModelMap(config["model_type"]).family.num_experts_field]


def uniform(clusters):
    return merge_weights("uniform", [1] * clusters)


def merged(config, parts, path, data=None, **settings):
    router = RouterSettings(**{"method": "ridge"} | settings)
    report = build_merged(
        parts, parts[0], config, uniform(len(parts)), data or batches(), directory=path, router=router
    )
    return load_model(path).eval(), report


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits


@pytest.mark.parametrize("router", ["ridge", "kept"])
@pytest.mark.parametrize("family", NORMALISED)
def test_normalised_weights_keep_the_branches_logits(family, router, tmp_path):
    config = tiny_config(family, CLUSTERS)
    parts = experts_of_one_seed(config, 1, tmp_path / "parts")
    model, report = merged(config, parts, tmp_path / "merged", method=router)
    tokens = batches(8, seed=1)[0][0]
    torch.testing.assert_close(
        logits(model, tokens), logits(runnable(load_model(parts[0])), tokens), rtol=1e-5, atol=2e-6
    )
    assert [entry["scale"] for entry in report["layers"]] == [1.0, 1.0]


@pytest.mark.parametrize("fails", [False, True])
def test_one_thread_reads_all_submodels_ahead_and_ends_with_the_merge(fails, tmp_path, monkeypatch):
    config = tiny_config("qwen3_moe", CLUSTERS, num_hidden_layers=4)
    parts = experts_of_one_seed(config, 1, tmp_path / "parts")
    threads, start = [], threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (threads.append(thread), start(thread)))

    def write(directory, tensors, *_, **__):  # in this thread, unlike the one that it replaces
        directory.mkdir()
        for key, _ in tensors:
            if fails and ".layers.2." in key:
                raise OSError(key)

    monkeypatch.setattr(build, "write_checkpoint", write)
    with pytest.raises(OSError, match=r"layers\.2") if fails else contextlib.nullcontext():
        build_merged(
            parts,
            parts[0],
            config,
            uniform(CLUSTERS),
            batches(),
            directory=tmp_path / "merged",
            router=RouterSettings("ridge"),
        )
    (thread,) = threads
    assert not thread.is_alive()


def router_inputs(model, data, layer):
    """What a layer's router reads in a plain forward pass, with the cluster of each token."""
    seen = []
    handle = routers(model)[layer].register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].flatten(0, -2)))
    for tokens, _ in data:
        logits(model, tokens)
    handle.remove()
    return torch.cat(seen), torch.cat([torch.as_tensor(cluster).repeat_interleave(LENGTH) for _, cluster in data])


@pytest.fixture(scope="module")
def from_one_seed(tmp_path_factory):
    """Merges sub-models of a family that equal one seed, once; returns the model and its calibration data to read."""

    @functools.cache
    def made(family):
        config, home, data = tiny_config(family, CLUSTERS), tmp_path_factory.mktemp(family), batches(48)
        model, _ = merged(
            config, experts_of_one_seed(config, 1, home / "parts"), home / "merged", data, match_load=False
        )
        return model, data

    return made


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_scikit_learns_ridge_of_what_each_layers_router_reads(from_one_seed, family, layer):
    model, data = from_one_seed(family)
    x_TD, label_T = (tensor.numpy() for tensor in router_inputs(model, data, layer))
    strength = ridge_strength(statistics(torch.from_numpy(x_TD), torch.from_numpy(label_T), CLUSTERS))
    coefficients = (
        Ridge(alpha=strength, fit_intercept=False).fit(x_TD.astype(np.float64), np.eye(CLUSTERS)[label_T]).coef_
    )
    expected = coefficients - coefficients.mean(0)
    router, hidden = routers(model)[layer], DECLARATIONS[family].router.hidden
    rows = (router.weight if hidden is None else router.weight @ router.get_parameter(hidden)).detach().double().numpy()
    np.testing.assert_allclose(rows / np.linalg.norm(rows), expected / np.linalg.norm(expected), atol=1e-4)


def routed_norm(model, tokens, layer):
    """Mean norm of what the routed experts of a layer add, on the model's own hidden states."""
    seen = []
    block = moe_blocks(model)[layer]
    handle = block.experts.register_forward_hook(lambda _m, _i, output: seen.append(output.norm(dim=-1).mean()))
    logits(model, tokens)
    handle.remove()
    return float(seen[0])


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("family", SCALED)
def test_unnormalised_weights_keep_the_branches_output_scale_only_when_matched(family, group, tmp_path):
    setting = {"norm_topk_prob": False} if family in NORMALISED else {}
    config = tiny_config(family, CLUSTERS * group, **setting)
    data = batches(48)
    parts = experts_of_one_seed(config, group, tmp_path / "parts")
    tokens = np.concatenate([tokens for tokens, _ in data])
    branch = routed_norm(load_model(parts[0]).eval(), tokens, 0)
    # Groups of several experts that are computed from data keep their tokens, whose weights then sum as in the
    # sub-model.
    method = "ridge" if group == 1 else "random"
    matched, report = merged(config, parts, tmp_path / "matched", data, method=method)
    left, _ = merged(config, parts, tmp_path / "left", data, method=method, match_scale=False)
    assert report["layers"][0]["scale"] > 1.1
    assert routed_norm(left, tokens, 0) < 0.9 * branch
    # With one expert per group all experts are equal and the scale is the only difference; with more, which of the
    # group's experts is chosen differs too, so only its order of magnitude is a law.
    tolerance = 0.01 if group == 1 else 0.25
    assert routed_norm(matched, tokens, 0) == pytest.approx(branch, rel=tolerance)
    if group == 1:
        reference = logits(runnable(load_model(parts[0])), tokens)
        error = {
            name: float((logits(model, tokens) - reference).norm() / reference.norm())
            for name, model in (("matched", matched), ("left", left))
        }
        assert error["matched"] < 0.75 * error["left"]


@pytest.mark.parametrize("family", SCALED)
def test_tokens_that_stay_in_one_group_keep_the_output_scale_by_themselves(family, tmp_path):
    config = tiny_config(family, CLUSTERS * 2, **({"norm_topk_prob": False} if family in NORMALISED else {}))
    data, parts = batches(48), experts_of_one_seed(config, 2, tmp_path / "parts")
    _, report = merged(config, parts, tmp_path / "merged", data)
    assert [entry["scale"] for entry in report["layers"]] == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize(("family", "is_stronger"), [("qwen3_moe", True), ("deepseek_v3", False), ("phimoe", False)])
def test_only_a_softmax_gets_stronger_directions(family, is_stronger, tmp_path):
    config, data = tiny_config(family, CLUSTERS * 2), batches(48)
    parts = experts_of_one_seed(config, 2, tmp_path / "parts")
    model, _ = merged(config, parts, tmp_path / "merged", data, match_load=False)
    layer = min(routers(model))
    own = routers(load_model(parts[0]))[layer].get_parameter("weight").repeat(CLUSTERS, 1)
    inputs, _ = router_inputs(model, data, layer)
    change = (routers(model)[layer].get_parameter("weight") - own).detach()
    size = float((inputs @ change.T).square().mean().sqrt())
    assert size > 1.4 if is_stronger else size == pytest.approx(1, rel=1e-3)


def separate_branches(config, path):
    """Sub-models with a common backbone and experts of their own, one per cluster."""
    return submodels(random_tensors(config, seed=2), config, CLUSTERS, path)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_from_data_send_documents_to_their_own_experts(family, tmp_path):
    # The normalised output of a recurrent layer with such random weights is noise as large as the embedding.
    attention = {"fields": {"full_attention_interval": 1}} if DECLARATIONS[family].recurrence is not None else {}
    config = tiny_config(family, CLUSTERS, hidden_size=64, **attention)
    parts = separate_branches(config, tmp_path / "parts")
    accuracy = {}
    for router in ("ridge", "random"):
        model, report = merged(config, parts, tmp_path / router, method=router)
        accuracy[router] = [entry["accuracy"] for entry in report["layers"]]
        for entry in report["layers"]:
            assert sum(entry["load_E"]) == pytest.approx(1)
            assert sum(entry["group_load_C"]) == pytest.approx(1)
            assert len(entry["load_E"]) == CLUSTERS
        assert next(model.parameters()).dtype == torch.float32
    assert min(accuracy["ridge"]) > 0.8
    assert max(accuracy["random"]) < 0.45  # chance is 0.25


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("router", ["ridge", "random"])
def test_matched_routers_begin_with_the_clusters_shares(router, group, tmp_path):
    config = tiny_config("qwen3_moe", group * CLUSTERS, hidden_size=64)
    parts = separate_branches(config, tmp_path / "parts")
    data = [
        (tokens[cluster < 2 + 2 * i], cluster[cluster < 2 + 2 * i]) for i, (tokens, cluster) in enumerate(batches(48))
    ]
    share = np.bincount(np.concatenate([cluster for _, cluster in data]), minlength=CLUSTERS) / sum(
        len(c) for _, c in data
    )
    worst = {}
    for match_load in (True, False):
        _, report = merged(config, parts, tmp_path / str(match_load), data, method=router, match_load=match_load)
        worst[match_load] = max(np.abs(np.array(entry["top1_load_C"]) - share).max() for entry in report["layers"])
    assert worst[True] < 0.02
    if router == "random":
        assert worst[False] > 0.1


def test_the_reported_accuracy_and_load_are_those_of_the_written_model(tmp_path):
    config = tiny_config("qwen3_moe", 2 * CLUSTERS, norm_topk_prob=False)
    parts = separate_branches(config, tmp_path / "parts")
    model, report = merged(config, parts, tmp_path / "merged")
    chosen = {layer: [] for layer in (0, 1)}
    for layer, block in moe_blocks(model).items():
        block.gate.register_forward_hook(lambda _m, _i, output, layer=layer: chosen[layer].append(output[2]))
    clusters = []
    for tokens, cluster in batches():
        logits(model, tokens)
        clusters.append(np.repeat(cluster, LENGTH))
    for layer, entry in enumerate(report["layers"]):
        selected = torch.cat(chosen[layer])
        load = torch.bincount(selected.flatten(), minlength=2 * CLUSTERS).double()
        reported = torch.tensor(entry["load_E"], dtype=torch.float64)
        torch.testing.assert_close(reported, load / load.sum(), atol=5e-3, rtol=0)
        hits = (selected[:, 0] // 2).numpy() == np.concatenate(clusters)
        assert entry["accuracy"] == pytest.approx(hits.mean(), abs=5e-3)


def test_only_routers_and_rescaled_projections_differ_from_the_plain_merge(tmp_path):
    config = tiny_config("qwen3_moe", CLUSTERS, norm_topk_prob=False, mlp_only_layers=[1], num_hidden_layers=3)
    parts = separate_branches(config, tmp_path / "parts")
    opened = [open_checkpoint(part) for part in parts]
    plain = {report.key: tensor for tensor, report in merge(opened, opened[0], model_map(config), uniform(4))}
    _, report = merged(config, parts, tmp_path / "merged")
    names = model_map(config)
    expected = [names.router_key(layer) for layer in (0, 2)]
    expected += [names.expert_key(layer, e, "down") for layer in (0, 2) for e in range(CLUSTERS)]
    assert differences(plain, open_checkpoint(tmp_path / "merged")) == sorted(expected)
    for entry in report["layers"]:
        key = names.expert_key(entry["layer"], 1, "down")
        torch.testing.assert_close(open_checkpoint(tmp_path / "merged")[key], plain[key] * entry["scale"])
    assert [entry["layer"] for entry in report["layers"]] == [0, 2]
    assert read_json(tmp_path / "merged/merge.json") == report
    assert {entry["key"] for entry in report["tensors"]} == set(plain)
    files = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert files == ["config.json", "merge.json", "model.safetensors"]


def test_concat_with_normalised_weights_is_the_plain_merge(tmp_path):
    config = tiny_config("olmoe", CLUSTERS)
    parts = separate_branches(config, tmp_path / "parts")
    merged(config, parts, tmp_path / "merged", method="kept")
    assert differences(random_tensors(config, seed=2), open_checkpoint(tmp_path / "merged")) == []


def test_the_same_seed_gives_the_same_bits_and_groups_share_their_direction(tmp_path):
    config = tiny_config("qwen3_moe", 2 * CLUSTERS)
    parts = separate_branches(config, tmp_path / "parts")
    for name in ("one", "two"):
        merged(config, parts, tmp_path / name)
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert differences(one, two) == []
    own = random_tensors(config, seed=2)
    key = model_map(config).router_key(0)
    moved = (one[key] - own[key]).view(CLUSTERS, 2, -1)
    torch.testing.assert_close(moved[:, 0], moved[:, 1], rtol=1e-4, atol=1e-5)
    assert moved.abs().max() > 0.01


def test_wrong_inputs_are_told(tmp_path):
    config = tiny_config("qwen3_moe", CLUSTERS)
    parts = separate_branches(config, tmp_path / "parts")
    stored = open_checkpoint(parts[0])
    for data, message in (([], "no calibration data"), (batches(), "names a cluster")):
        with pytest.raises(CheckpointError, match=message):
            next(calibrated(stored.items(), stored.config, 1, data, settings=RouterSettings("ridge"), report=[]))
    with pytest.raises(CheckpointError):
        merged(tiny_config("qwen3_moe", 2 * CLUSTERS), parts, tmp_path / "merged")
    other = tiny_config("olmoe", CLUSTERS)
    write_checkpoint(tmp_path / "olmoe", random_tensors(other).items(), other)
    with pytest.raises(CheckpointError, match="family"):
        merged(config, [*parts[:3], tmp_path / "olmoe"], tmp_path / "merged")


class Passes:
    """Counts the forward passes of every decoder layer."""

    def __init__(self, monkeypatch):
        self.counts = Counter()
        original = calibrate.layer_step

        def counting(model, layer):
            step = original(model, layer)

            def counted(hidden):
                self.counts[layer] += 1
                return step(hidden)

            return counted

        monkeypatch.setattr(calibrate, "layer_step", counting)


def test_calibration_passes_through_a_layer_at_most_twice(tmp_path, monkeypatch):
    config = tiny_config("olmoe", CLUSTERS, num_hidden_layers=6)
    parts = separate_branches(config, tmp_path / "parts")
    passes = Passes(monkeypatch)
    merged(config, parts, tmp_path / "merged")
    assert passes.counts == {**dict.fromkeys(range(5), 2 * len(batches())), 5: len(batches())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_model_is_merged_in_bf16_and_small_files_hold_the_same(family, tmp_path, monkeypatch):
    config = tiny_config(family, CLUSTERS)
    parts = submodels(random_tensors(config, torch.bfloat16), config, CLUSTERS, tmp_path / "parts")
    merged(config, parts, tmp_path / "one")
    monkeypatch.setattr(build, "write_checkpoint", functools.partial(write_checkpoint, max_shard_bytes=2000))
    merged(config, parts, tmp_path / "many")
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert {one.dtype(key) for key in one} == {torch.bfloat16}
    assert differences(one, many) == []
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
