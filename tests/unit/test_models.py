from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from moe_models import ALONE, LENGTH, VOCAB, built, in_memory, model_map, moe, random_tensors, tiny_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moedisco_ray.core.config import FAMILIES, Architecture
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import (
    ModelMap,
    Role,
    canonical_shapes,
    canonical_state,
    check_same,
    checkpoint_writer,
    config_values,
    differences,
    hf_config,
    load_model,
    model_tensors,
    open_checkpoint,
    random_weights,
    save_model,
    specialise,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.models.hf import from_values
from moedisco_ray.models.speed import grouped_experts, sorted_experts

TOKENS = torch.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB


def build(config):
    return built(config, random_weights(config, 3))


@settings(max_examples=40, deadline=None)
@given(moe())
def test_canonical_to_memory_and_back_is_bitwise_the_identity(case):
    config, tensors, _ = case
    model = built(config, tensors)
    check_same(dict(model_tensors(model)), tensors)
    check_same(canonical_state(in_memory(config, tensors), model_map(config)), tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_bits_are_those_that_transformers_itself_writes(family, tmp_path):
    model = build(tiny_config(family))
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    theirs, ours = load_file(tmp_path / "theirs/model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    check_same(theirs, ours)
    check_same(open_checkpoint(tmp_path / "theirs"), ours)
    assert torch.equal(load_model(tmp_path / "ours")(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_checkpoint_reads_as_the_classic_one(family, tmp_path):
    config = tiny_config(family)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "fused", in_memory(config, tensors).items(), config)
    check_same(open_checkpoint(tmp_path / "fused"), tensors)


def test_mixtrals_fused_names_under_the_block_name_of_the_checkpoint_read_too(tmp_path):
    config = tiny_config("mixtral")
    tensors = random_tensors(config)
    stacked = in_memory(config, tensors)
    renamed = {key.replace(".mlp.", ".block_sparse_moe."): tensor for key, tensor in stacked.items()}
    write_checkpoint(tmp_path, renamed.items(), config)
    check_same(open_checkpoint(tmp_path), tensors)


def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssFile")))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
def test_one_expert_of_a_fused_file_is_read_without_the_others(tmp_path):
    config = tiny_config("qwen3_moe", num_experts=32, hidden_size=256, moe_intermediate_size=512, num_hidden_layers=1)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, in_memory(config, tensors).items(), config)
    key = model_map(config).expert_key(0, 5, "up")
    whole = sum(tensor.nbytes for tensor in tensors.values())
    before = resident_bytes()
    opened = open_checkpoint(tmp_path)
    read = opened[key].clone()
    assert resident_bytes() - before < whole / 10
    assert torch.equal(read, tensors[key])
    assert opened.shape(key) == tuple(read.shape)


@settings(max_examples=25, deadline=None)
@given(moe())
def test_every_tensor_has_one_role(case):
    config, tensors, _ = case
    names = model_map(config)
    roles = {key: names.classify(key) for key in tensors}
    for key, role in roles.items():
        if role.expert is not None:
            assert names.expert_key(role.layer, role.expert, role.part) == key
    shared = [key for key, role in roles.items() if role.role is Role.SHARED_EXPERT]
    moe_layers = {role.layer for role in roles.values() if role.role is Role.ROUTER}
    expected = 0 if names.family.shared is None else 3 + (names.family.shared.gate is not None)
    assert len(shared) == expected * len(moe_layers)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.experts.0.gate_proj.bias",
        "model.layers.0.mlp.gate.temperature",
        "model.x.weight",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.x.mlp.gate.weight",
        "score.weight",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_tensor_is_an_error(family, key, tmp_path):
    with pytest.raises(CheckpointError, match="is no tensor of family"):
        ModelMap(family).classify(key)
    config = tiny_config(family)
    write_checkpoint(tmp_path, [*random_tensors(config).items(), (key, torch.ones(1))], config)
    with pytest.raises(CheckpointError, match="is no tensor of family"):
        open_checkpoint(tmp_path)


def test_families_do_not_claim_each_others_tensors():
    with pytest.raises(CheckpointError):
        ModelMap("mixtral").classify("model.layers.0.mlp.experts.0.gate_proj.weight")
    with pytest.raises(CheckpointError):
        ModelMap("qwen3_moe").classify("model.layers.0.mlp.shared_expert.up_proj.weight")
    with pytest.raises(CheckpointError, match="not supported"):
        ModelMap("llama")


@pytest.mark.parametrize("tied", [False, True])
def test_shards_are_small_complete_and_load(tied, tmp_path):
    config = tiny_config("olmoe", tie_word_embeddings=tied)
    tensors = random_tensors(config)
    assert ("lm_head.weight" in tensors) is not tied
    total = write_checkpoint(tmp_path, tensors.items(), config, max_shard_bytes=8000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 8000
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] == total
    check_same(open_checkpoint(tmp_path), tensors)
    check_same(dict(model_tensors(load_model(tmp_path))), tensors)
    assert not list(tmp_path.glob(".*"))


def test_a_redundant_head_of_a_tied_model_is_passed_over(tmp_path):
    config = tiny_config("olmoe", tie_word_embeddings=True)
    tensors = random_tensors(config)
    head = tensors["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path, [*tensors.items(), ("lm_head.weight", head)], config)
    check_same(open_checkpoint(tmp_path), tensors)


def test_writing_holds_one_shard_and_keeps_no_view_alive(tmp_path, monkeypatch):
    alive, most = [], []
    original = checkpoint_writer.save_file

    def watching(shard, path, metadata):
        alive.append(sum(t.untyped_storage().nbytes() for t in shard.values()))
        original(shard, path, metadata=metadata)

    monkeypatch.setattr(checkpoint_writer, "save_file", watching)

    def stream():
        base = torch.zeros(100, 1000)
        for row in range(100):
            most.append(row)
            yield f"row.{row}", base[row]

    write_checkpoint(tmp_path, stream(), {}, max_shard_bytes=10 * 4000)
    assert alive == [40_000] * 10


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_writer, "save_file", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_checkpoint(tmp_path, [("a", torch.ones(1))], {})
    assert caught.value.errno == errno.ENOSPC


def test_broken_directories_are_told_in_one_line(tmp_path):
    config = tiny_config("qwen3_moe")
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="holds neither"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="missing or broken"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        open_checkpoint(tmp_path)


def test_tensors_that_are_there_twice_are_an_error(tmp_path):
    config = tiny_config("qwen3_moe")
    tensors = random_tensors(config)
    with pytest.raises(CheckpointError, match="twice"):
        write_checkpoint(tmp_path, [*tensors.items(), ("model.norm.weight", torch.ones(16))], config)
    both = in_memory(config, tensors) | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(8, 16)}
    write_checkpoint(tmp_path, both.items(), config)
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_weights_that_do_not_fit_the_configuration_do_not_load(change, tmp_path):
    config = tiny_config("qwen3_moe")
    tensors = random_tensors(config)
    key = "model.layers.1.self_attn.q_norm.weight"
    tensors[key] = torch.ones(3)
    if change == "missing":
        del tensors[key]
    write_checkpoint(tmp_path, tensors.items(), config)
    with pytest.raises(CheckpointError):
        load_model(tmp_path)


def test_incomplete_experts_are_an_error():
    config = tiny_config("mixtral")
    tensors = random_tensors(config)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3"):
        model_map(config).experts(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_source_gives_the_same_bits_in_any_order(family):
    config = tiny_config(family, initializer_range=0.02, hidden_size=64)
    source, again = random_weights(config, 7), random_weights(config, 7)
    keys = list(source)
    backwards = {key: again[key] for key in reversed(keys)}
    check_same(source, backwards)
    assert {key: tuple(source[key].shape) for key in keys} == canonical_shapes(config)
    assert len(differences(source, random_weights(config, 8))) > len(keys) // 3
    names = ModelMap(family)
    keys = (
        [names.block_key(0, f"experts.{name}") for name in ("gate_up_proj", "down_proj")]
        if DECLARATIONS[family].stacks
        else [names.expert_key(0, 0, part) for part in ("up", "down")]
    )
    up, down = (source[key] for key in keys)
    assert abs(float(up.std()) - 0.02) < 2e-3
    assert not torch.equal(up.flatten(), down.flatten())
    one = torch.zeros if DECLARATIONS[family].recurrence is not None else torch.ones  # its norms multiply by 1 + weight
    assert torch.equal(source["model.norm.weight"], one(64))
    if family == "qwen2_moe":
        assert not source["model.layers.0.self_attn.q_proj.bias"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_reaches_the_model(family):
    page = DECLARATIONS[family]
    latent, wide = page.attention.latent, {"head_dim": 12} if page.attention.own_head_dim else {}
    shared = {"shared_expert_intermediate_size": 40} if page.shared is not None and page.shared.size_field else {}
    normalised = page.router.normalises == "always"
    architecture = Architecture(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=None if latent else 2,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=normalised,
        vocab_size=100,
        max_position_embeddings=77,
        rope_theta=5000.0,
        rms_norm_eps=1e-4,
        initializer_range=0.03,
        **wide,
        **shared,
    )
    config = hf_config(family, architecture, 64, 16, 5)
    values = config_values(config)
    assert from_values(values).to_dict() == {**config.to_dict(), "architectures": values["architectures"]}
    shapes = canonical_shapes(values)
    head = 12 if wide else 8
    assert latent or shapes["model.layers.1.self_attn.k_proj.weight"] == (2 * head, 32)
    assert page.stacks or shapes[ModelMap(family).expert_key(2, 5, "gate")] == (24, 32)
    inputs = page.router.hidden_size({}, 6) or 32
    assert shapes[ModelMap(family).router_key(0)] == (6, inputs)
    assert shapes["lm_head.weight"] == (100, 32)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert (config.rms_norm_eps, config.max_position_embeddings) == (1e-4, 77)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (5, 5, None)
    if shared:
        assert shapes["model.layers.0.mlp.shared_expert.up_proj.weight"] == (40, 32)
    if page.router.normalises == "by_setting":
        assert config.norm_topk_prob is False
    with pytest.raises(ConfigError, match="smaller than the tokenizer"):
        hf_config(family, architecture, 101, 16, 0)
    sub = submodel_config(values, 2)
    assert canonical_shapes(sub)[ModelMap(family).router_key(0)] == (2, inputs)
    assert sub[page.router.top_k_field] == 2


def test_a_head_size_that_the_family_cannot_have_is_an_error():
    with pytest.raises(ConfigError, match="head_dim"):
        hf_config("olmoe", Architecture(hidden_size=32, num_attention_heads=4, head_dim=16), 64, 16, 0)


def test_the_end_token_is_trained():
    model = build(tiny_config("olmoe", num_experts=1))
    model(input_ids=torch.zeros(1, 8, dtype=torch.long), labels=TOKENS[:1, :8]).loss.backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0


@pytest.mark.parametrize("autocast", [False, True])
def test_the_path_of_gpus_computes_what_the_path_of_cpus_computes(autocast):
    model = specialise(build(tiny_config("qwen3_moe", 4)))
    experts = model.model.layers[0].mlp.experts
    random = torch.Generator().manual_seed(5)
    expert_TK = torch.stack([torch.randperm(4, generator=random)[:2] for _ in range(24)])
    weight_TK = torch.rand(24, 2, generator=random)
    found = []
    for path in (sorted_experts, grouped_experts):
        experts.zero_grad()
        x_TD = torch.randn(24, model.config.hidden_size, generator=torch.Generator().manual_seed(6)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_TD = path(experts, x_TD, expert_TK, weight_TK)
        y_TD.square().sum().backward()
        found.append([y_TD, x_TD.grad, experts.gate_up_proj.grad, experts.down_proj.grad])
    for loop, grouped in zip(*found, strict=True):
        assert loop.dtype == grouped.dtype == torch.float32
        assert torch.linalg.vector_norm(loop - grouped) < (2e-2 if autocast else 1e-6) * torch.linalg.vector_norm(loop)
    exact_TD = sorted_experts(experts, x_TD, expert_TK, weight_TK)
    assert torch.allclose(found[1][0], exact_TD, rtol=1e-5) is not autocast, "bf16 rounds"


def test_a_forward_pass_without_gradients_takes_the_path_of_training_while_the_model_trains(monkeypatch):
    """Before: the forward pass of streamed training took another path than the one that computes it again."""
    experts = specialise(build(tiny_config("qwen3_moe", 4))).model.layers[0].mlp.experts
    seen, usual = [], ALL_EXPERTS_FUNCTIONS["grouped_mm"]

    def noting(*given):
        seen.append(experts.training)
        return usual(*given)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", noting)
    x_TD, expert_TK = torch.randn(8, experts.down_proj.shape[1]), torch.arange(8)[:, None] % 4
    with torch.no_grad():
        trained, evaluated = (
            grouped_experts(experts.train(mode), x_TD, expert_TK, torch.ones(8, 1)) for mode in (True, False)
        )
    assert seen == [False]
    torch.testing.assert_close(trained, evaluated)


@pytest.mark.parametrize("path", [sorted_experts, grouped_experts])
def test_experts_that_no_token_selects_compute_nothing(path):
    """A worker of divided experts may have a step in which all tokens select the others' experts."""
    model = specialise(build(tiny_config("qwen3_moe", 4)))
    experts = model.model.layers[0].mlp.experts
    x_TD = torch.empty(0, model.config.hidden_size, requires_grad=True)
    y_TD = path(experts, x_TD, torch.empty(0, 1, dtype=torch.long), torch.empty(0, 1))
    assert y_TD.shape == x_TD.shape
    y_TD.sum().backward()
    assert not experts.gate_up_proj.grad.any()
    assert not experts.down_proj.grad.any()


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("family", "experts"), [*((family, 4) for family in FAMILIES), *((family, 1) for family in ALONE)]
)
def test_specialised_models_compute_what_stock_models_compute(family, experts, normalised):
    config = tiny_config(family, experts, norm_topk_prob=normalised)
    stock, ours = build(config), specialise(build(config))
    assert isinstance(ours, type(stock))
    assert list(ours.state_dict()) == list(stock.state_dict())
    results = [model(input_ids=TOKENS, labels=TOKENS) for model in (stock, ours)]
    torch.testing.assert_close(results[0].logits, results[1].logits, rtol=1e-5, atol=1e-5)
    for result in results:
        result.loss.backward()
    for (name, theirs), (_, mine) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        if f".{DECLARATIONS[family].router.module}." in name and experts == 1:
            assert not mine.requires_grad
            # the share of a sigmoid in itself is 1, but its gradient is rounded
            rounding = 1e-7 if DECLARATIONS[family].router.scores == "sigmoid" else 0.0
            assert theirs.grad is None or theirs.grad.abs().max() <= rounding
        else:
            torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_block_may_lack_its_shared_expert():
    config = tiny_config("ernie4_5_moe", 1, moe_num_shared_experts=0)
    stock, ours = build(config), specialise(build(config))
    torch.testing.assert_close(stock(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_specialised_experts_are_deterministic_and_serve_an_idle_expert():
    config = tiny_config("qwen3_moe", 8, num_experts_per_tok=1)
    model = specialise(build(config))
    one_token = TOKENS[:1, :1]
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(input_ids=one_token.expand(1, 4), labels=one_token.expand(1, 4)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    check_same(*gradients)
    used = gradients[0]["model.layers.0.mlp.experts.down_proj"].flatten(1).any(dim=1)
    assert 0 < int(used.sum()) < 8


def test_a_corrupt_index_and_a_lost_shard(tmp_path):
    config = tiny_config("qwen3_moe")
    write_checkpoint(tmp_path, random_tensors(config).items(), config, max_shard_bytes=8000)
    min(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="missing or broken"):
        open_checkpoint(tmp_path)
    for text in (b"{", b"\xff", b'{"weight_map": {"a": ["b"]}}', b'{"weight_map": {"a": 1}}', b"[1]"):
        (tmp_path / "model.safetensors.index.json").write_bytes(text)
        with pytest.raises(CheckpointError, match="index cannot be read"):
            open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"no readable config\.json"):
        open_checkpoint(tmp_path)


def test_nothing_to_write_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no tensor"):
        write_checkpoint(tmp_path, [], {})
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        open_checkpoint(tmp_path)
