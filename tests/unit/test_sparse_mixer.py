"""SparseMixer, the router of phimoe: its training without sampling is repeatable, with the weights of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import LENGTH, VOCAB, tiny_config
from test_families import TOKENS, config_of, logits, sizes_of, stored, training_job
from test_scale_trap import CLUSTERS, batches, experts_of_one_seed, merged
from test_scale_trap import logits as logits_of
from tiny_training import RECIPE
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moedisco_ray.contrib.experts.choose_experts import choose_experts
from moedisco_ray.contrib.gguf.file import check_gguf
from moedisco_ray.core.config import read_architecture
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import check_same, hf_config, load_model, open_checkpoint, read_config, routers, runnable
from moedisco_ray.models.hf import config_values
from moedisco_ray.models.routing import Selection, scores, sparse_mixer
from moedisco_ray.plan import count_parameters
from moedisco_ray.stages.decompose import write_submodels
from moedisco_ray.training import World, train
from moedisco_ray.training.sharding import trainable

LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * number for number in range(8)],
    "long_factor": [4.0] * 8,
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": LENGTH,
}


@given(
    rows=st.lists(st.lists(st.floats(-4, 4, width=32), min_size=5, max_size=5), min_size=1, max_size=6),
    near=st.floats(0, 0.05),
    jitter=st.sampled_from([0.0, 0.01, 0.2]),
)
@settings(max_examples=200, deadline=None)
def test_weights_are_those_of_transformers_at_inference(rows: list[list[float]], near: float, jitter: float) -> None:
    logits_TE = torch.tensor(rows)
    logits_TE[:, 1] = logits_TE[:, 0] * (1 + near)  # two logits that a weight may be divided between
    weight_TK, index_TK = sparsemixer(logits_TE, jitter_eps=jitter, training=False)
    found_index_TK, found_TK = sparse_mixer(logits_TE, 2, jitter)
    assert torch.equal(found_index_TK, index_TK)
    assert torch.equal(found_TK, weight_TK)


def test_a_single_expert_has_the_weight_one() -> None:
    router = DECLARATIONS["phimoe"].router
    selection = Selection.of(router, {"num_experts_per_tok": 1, "router_jitter_noise": 0.01})
    _, weight_TK = selection(scores(torch.randn(5, 1), router))
    assert torch.equal(weight_TK, torch.ones(5, 1))


def test_training_does_not_sample_and_reaches_the_routers(tmp_path: Path) -> None:
    directory = stored("phimoe", tmp_path, fields={"router_jitter_noise": 0.4})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"input_jitter_noise": 0.1}), encoding="utf-8")
    found = []
    for _ in range(2):
        model = trainable(directory, RECIPE, World())
        assert model.training
        loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
        loss.backward()
        found.append({"loss": loss.detach()[None]} | {name: each.grad for name, each in model.named_parameters()})
        assert all(router.get_parameter("weight").grad.abs().max() > 0 for router in routers(model).values())
    check_same(*found)
    expected = AutoModelForCausalLM.from_pretrained(directory)(TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(found[0]["loss"][0] / (2 * (LENGTH - 1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_training_of_a_submodel_can_be_repeated(experts: int, tmp_path: Path) -> None:
    source = open_checkpoint(stored("phimoe", tmp_path / "model"))
    write_submodels(source, read_config(source.directory), 8 // experts, tmp_path / "parts")
    outputs = []
    for home in (tmp_path / "one", tmp_path / "two"):
        train(training_job(tmp_path / "parts" / "0", home), World(), lambda _: None, lambda: False)
        outputs.append(open_checkpoint(home / "out"))
    check_same(*outputs)


@pytest.mark.parametrize("group", [1, 2])
def test_the_merge_measures_transformers_weights_and_keeps_the_output_scale(group: int, tmp_path: Path) -> None:
    config, data = tiny_config("phimoe", CLUSTERS * group, router_jitter_noise=0.1), batches(48)
    parts = experts_of_one_seed(config, group, tmp_path / "parts")
    matched, report = merged(config, parts, tmp_path / "matched", data)
    left, _ = merged(config, parts, tmp_path / "left", data, match_scale=False)
    entry, tokens = report["layers"][0], np.concatenate([tokens for tokens, _ in data])
    assert entry["weight_sum"] == pytest.approx(mean_weight_sum(matched, tokens), rel=0.01)
    own = 1.0 if group == 1 else mean_weight_sum(load_model(parts[0]).eval(), tokens)
    assert entry["scale"] == pytest.approx(own / entry["weight_sum"], rel=0.01)
    if group == 1:
        reference = logits_of(runnable(load_model(parts[0])), tokens)
        errors = [float((logits_of(model, tokens) - reference).norm() / reference.norm()) for model in (matched, left)]
        assert errors[0] < 0.75 * errors[1]


def mean_weight_sum(model: PreTrainedModel, tokens: Any) -> float:
    """Mean sum of the weights of a token's experts in the first layer, as transformers computes them."""
    seen: list[torch.Tensor] = []
    handle = routers(model)[0].register_forward_hook(
        lambda _module, _inputs, output: seen.append(output[1].sum(dim=-1).mean())
    )
    logits_of(model, tokens)
    handle.remove()
    return float(seen[0])


@pytest.mark.parametrize("tied", [False, True])
def test_the_published_settings_are_those_of_a_random_start(tied: bool, tmp_path: Path) -> None:
    """Scaled positions, and biases of the attention, the norms and the head, with a tied head too."""
    directory = stored(
        "phimoe", tmp_path / "model", rope_scaling=LONG, max_position_embeddings=2 * LENGTH, tie_word_embeddings=tied
    )
    expected = logits(directory)
    sizes = read_architecture(directory, "phimoe")
    assert sizes.rope_scaling == LONG
    source = open_checkpoint(directory)
    assert {"model.norm.bias", "lm_head.bias", "model.layers.0.self_attn.o_proj.bias"} <= set(source)
    assert count_parameters("phimoe", sizes, VOCAB).total == sum(tensor.numel() for tensor in source.values())
    loss = trainable(directory, RECIPE, World())(TOKENS[:, :-1], TOKENS[:, 1:])
    by_hand = torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        (
            {"num_experts_per_tok": 3},
            "num_experts_per_tok 3 is not 2, the number of experts that this router always selects; use 2",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling.rope_type 'linear': phimoe has only longrope; use it",
        ),
        (
            {"rope_scaling": {key: value for key, value in LONG.items() if key != "long_mscale"}},
            "rope_scaling: rope_type 'longrope' of phimoe also needs long_mscale",
        ),
        (
            {"norm_topk_prob": True},
            "norm_topk_prob true: phimoe never normalises its router weights; remove the setting",
        ),
    ],
)
def test_what_the_router_and_the_positions_cannot_be_is_one_line(
    sizes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of("phimoe", 2, **sizes)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    if "norm_topk_prob" in sizes:
        return
    raw = {
        "model_type": "phimoe",
        "num_hidden_layers": 1,
        "intermediate_size": 16,
        "num_local_experts": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **sizes,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: ") as error:
        read_architecture(tmp_path, "phimoe")
    assert line in str(error.value)


def test_chosen_experts_keep_the_number_per_token_and_the_threshold(tmp_path: Path) -> None:
    model, other = (
        stored("phimoe", tmp_path / "model"),
        stored("phimoe", tmp_path / "other", fields={"router_jitter_noise": 0.1}),
    )
    with pytest.raises(
        ConfigError, match=r"^--top-k: 3: is not 2, the number of experts that this router always selects; use 2"
    ):
        choose_experts(str(model), ["0-3"], tmp_path / "out", top_k=3)
    with pytest.raises(ConfigError, match=r"^EXPERTS: 1: is too few for the router of phimoe; choose at least 2"):
        choose_experts(str(model), ["0"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has router_jitter_noise 0\.1, but RUN_DIR has 0\.01"):
        choose_experts(str(model), ["0-3", f"{other}:1"], tmp_path / "out")


def test_there_is_no_gguf_file_and_the_line_says_why() -> None:
    values = config_values(hf_config("phimoe", sizes_of("phimoe"), VOCAB, LENGTH, 0))
    with pytest.raises(
        CheckpointError, match=r"^model_type: 'phimoe': llama\.cpp has RMSNorms .* by a softmax .* `--to hf`"
    ):
        check_gguf(DECLARATIONS["phimoe"], values)
