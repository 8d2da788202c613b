"""LLaMA-MoE against its definition in plain, slow torch, with the names and configuration of published files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import tiny_config
from safetensors.torch import load_file, save_file
from test_pipeline import run
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from moedisco_ray.core.config import read_architecture
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.models import (
    Role,
    check_same,
    load_model,
    open_checkpoint,
    random_weights,
    read_config,
    save_model,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.models.checks import open_complete
from moedisco_ray.plan import count_parameters
from moedisco_ray.stages.decompose import decompose
from moedisco_ray.stages.export.directory import stored_names
from moedisco_ray.stages.merge.calibrate import RouterSettings, calibrated

D, F, E, K, LAYERS, VOCAB, SCALE = 32, 12, 4, 2, 2, 640, 4.0
TOKENS = torch.arange(48).reshape(2, 24) * 37 % VOCAB
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaMoEForCausalLM"],
    "model_type": "llama_moe",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": E * F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": E,
    "num_selects": K,
    "size_experts": [[F] * E] * LAYERS,
    "score_scale_factor": SCALE,
    "gate_type": "TopKBalancedNoisyGate",
    "gate_network": "mlp",
    "gate_use_softmax": True,
    "gate_use_balance": True,
    "gate_balance_loss_weight": 0.01,
    "gate_add_noise": True,
    "gate_noise_epsilon": 0.01,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "add_weight_norm": False,
    "drop_tokens": True,
    "dropped_padding": "zero",
    "capacity_factor": 1.25,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "auto_map": {"AutoConfig": "configuration_llama_moe.LlamaMoEConfig"},
}
"""A `config.json` with the fields of published ones."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the files and names of published ones."""
    directory = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (VOCAB, D),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
        shapes |= {
            f"{prefix}mlp.gate.gate_network.0.weight": (E, D),
            f"{prefix}mlp.gate.gate_network.2.weight": (E, E),
            f"{prefix}mlp.gate.weight_noise.weight": (E, D),
            f"{prefix}self_attn.rotary_emb.inv_freq": (4,),
        }
        for expert in range(E):
            shapes |= {f"{prefix}mlp.calculator.experts.weight_{name}.{expert}": (F, D) for name in ("gate", "up")}
            shapes[f"{prefix}mlp.calculator.experts.weight_down.{expert}"] = (D, F)
    save_file({name: torch.randn(shape) * 0.4 for name, shape in shapes.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(PUBLISHED))
    return directory


class Block(nn.Module):
    """The MoE block, token by token."""

    def __init__(self, tensors: Mapping[str, Tensor], layer: int) -> None:
        super().__init__()
        prefix = f"model.layers.{layer}.mlp."
        self.tensors = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
        }

    def forward(self, x_BLD: Tensor) -> Tensor:
        found = [self.token(x_D) for x_D in x_BLD.flatten(0, 1)]
        return torch.stack(found).view_as(x_BLD)

    def token(self, x_D: Tensor) -> Tensor:
        first, second = (self.tensors[f"gate.gate_network.{number}.weight"] for number in (0, 2))
        best, experts = (second @ torch.tanh(first @ x_D)).topk(K)
        y_D = torch.zeros(D)
        for weight, expert in zip(best.softmax(0), experts.tolist(), strict=True):
            gate, up, down = (
                self.tensors[f"calculator.experts.weight_{name}.{expert}"] for name in ("gate", "up", "down")
            )
            y_D += SCALE * weight * (down @ (functional.silu(gate @ x_D) * (up @ x_D)))
        return y_D


def reference(tensors: Mapping[str, Tensor]) -> Tensor:
    """Logits of a LLaMA with this block in place of its MLP."""
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                name: PUBLISHED[name]
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "rms_norm_eps",
                    "max_position_embeddings",
                )
            }
        )
    )
    for number, layer in enumerate(model.model.layers):
        layer.mlp = Block(tensors, number)
    model.load_state_dict(
        {name: tensor for name, tensor in tensors.items() if ".mlp." not in name and "inv_freq" not in name}
    )
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def test_the_logits_are_those_of_the_definition(published: Path) -> None:
    expected = reference(load_file(published / "model.safetensors"))
    for model in (load_model(published).eval(), load_model(published).train()):  # without the noise of training
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_new_models_have_no_noise() -> None:
    config = tiny_config("llama_moe")
    weights = random_weights(config, 0)
    noise = [weights[key] for key in weights if key.endswith("weight_noise.weight")]
    assert len(noise) == config["num_hidden_layers"]
    assert not any(tensor.any() for tensor in noise)


def test_files_keep_the_names_and_the_bits_of_the_original(published: Path, tmp_path: Path) -> None:
    stored = {
        name: tensor for name, tensor in load_file(published / "model.safetensors").items() if "inv_freq" not in name
    }
    found, _ = open_complete(published)
    check_same(dict(found), stored)
    model = load_model(published)
    save_model(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "transformers")
    for directory in (tmp_path / "ours", tmp_path / "transformers"):
        check_same({name: open_checkpoint(directory)[name] for name in stored_names(directory)}, stored)
    written = read_config(tmp_path / "ours")
    assert (
        written.items()
        >= {
            name: PUBLISHED[name]
            for name in (
                "architectures",
                "model_type",
                "num_experts",
                "num_selects",
                "intermediate_size",
                "score_scale_factor",
                "gate_network",
                "gate_add_noise",
                "calculator_type",
            )
        }.items()
    )


def test_a_submodel_keeps_the_first_layer_of_the_router_and_the_rows_of_its_experts(
    published: Path, tmp_path: Path
) -> None:
    source = open_checkpoint(published)
    config = submodel_config(read_config(published), 2)
    assert (
        config.items()
        >= {"num_experts": 2, "num_selects": 2, "moe_intermediate_size": F, "gate_hidden_size": E}.items()
    )
    part = dict(decompose(source, source.model_map, E, 2, 1))
    write_checkpoint(tmp_path, part.items(), config)
    prefix = "model.layers.0.mlp."
    first, second, noise = (
        f"{prefix}gate.{name}.weight" for name in ("gate_network.0", "gate_network.2", "weight_noise")
    )
    assert source.model_map.classify(first).role is Role.BACKBONE
    check_same(
        {first: part[first], second: part[second], noise: part[noise]},
        {first: source[first], second: source[second][2:], noise: source[noise][2:]},
    )
    name = "calculator.experts.weight_up"
    check_same({"up": part[f"{prefix}{name}.0"]}, {"up": source[f"{prefix}{name}.2"]})
    assert load_model(tmp_path)(TOKENS).logits.isfinite().all()
    assert read_architecture(tmp_path, "llama_moe").fields["gate_hidden_size"] == E


def test_the_rows_are_calibrated_on_what_they_multiply(published: Path, tmp_path: Path) -> None:
    source, report = open_checkpoint(published), list[dict[str, Any]]()
    batches = [(TOKENS.numpy(), torch.tensor([0, 1]).numpy())] * 2
    found = dict(
        calibrated(source.stream(), read_config(published), 2, batches, settings=RouterSettings("ridge"), report=report)
    )
    changed = {name for name in source if not torch.equal(source[name], found[name])}
    assert changed == {f"model.layers.{layer}.mlp.gate.gate_network.2.weight" for layer in range(LAYERS)}
    assert [entry["scale"] for entry in report] == [1.0] * LAYERS
    write_checkpoint(tmp_path, found.items(), read_config(published))
    logits = load_model(tmp_path)(TOKENS, output_router_logits=True).router_logits
    for entry, logits_TE in zip(report, logits, strict=True):
        load_E = logits_TE.topk(K).indices.flatten().bincount(minlength=E) / (K * TOKENS.numel())
        assert entry["load_E"] == pytest.approx(load_E.tolist()), (
            "measured with the inputs that the rows have in the model"
        )


def test_a_published_model_goes_through_a_run(published: Path, tmp_path: Path) -> None:
    directory = run(
        tmp_path,
        model={"family": None, "config": None, "init": {"checkpoint": str(published)}},
        clusters={"count": 2, "vectors": "mean_token"},
        tokenizer={"replace": True},
    )
    before, after = open_checkpoint(published), open_checkpoint(directory / "model")
    assert set(after) == set(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) - moved == {f"model.layers.{layer}.mlp.gate.weight_noise.weight" for layer in range(LAYERS)}
    kept = PUBLISHED.keys() - {"bos_token_id", "eos_token_id", "pad_token_id", "size_experts"}
    assert {name: after.config[name] for name in kept} == {name: PUBLISHED[name] for name in kept}
    assert after.config["size_experts"] is None, "which means the same to the original: equal sizes"
    assert "import moedisco_ray.models" in (directory / "model" / "README.md").read_text(encoding="utf-8")
    stages = read_json(directory / "evaluation" / "evaluation.json")["stages"]
    assert stages["finetune"]["perplexity"] < stages["merge"]["perplexity"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gate_network": "linear"}, "gate_network 'linear': llama_moe is supported with 'mlp' only"),
        ({"gate_add_noise": False}, "gate_add_noise False: llama_moe is supported with True only"),
        ({"calculator_type": "SwitchDropTokenCalculator"}, "is supported with 'UniversalCalculator' only"),
        ({"score_scale_factor": [4.0] * LAYERS}, r"fields\.score_scale_factor"),
    ],
)
def test_what_the_model_does_not_compute_is_refused(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes))
    with pytest.raises(CheckpointError, match=line):
        read_architecture(tmp_path, "llama_moe")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"size_experts": [[F - 1, F + 1, F, F]] * LAYERS},
            "size_experts: experts of different sizes are not supported",
        ),
        ({"intermediate_size": E * F + 1}, "intermediate_size 49 is not a multiple of num_experts 4"),
    ],
)
def test_experts_of_different_sizes_are_refused(
    tmp_path: Path, published: Path, changes: dict[str, Any], line: str
) -> None:
    (tmp_path / "model.safetensors").symlink_to(published / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {"size_experts": None} | changes))
    with pytest.raises(CheckpointError, match=line):
        open_complete(tmp_path)


@pytest.mark.parametrize(("experts", "selects", "active"), [(16, 4, 3.5e9), (16, 2, 3.0e9), (8, 2, 3.5e9)])
def test_the_published_configurations_are_read(tmp_path: Path, experts: int, selects: int, active: float) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            PUBLISHED
            | {
                "vocab_size": 32_000,
                "hidden_size": 4096,
                "intermediate_size": 11_008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "num_experts": experts,
                "num_selects": selects,
                "size_experts": [[11_008 // experts] * experts] * 32,
                "score_scale_factor": experts / selects,
            }
        )
    )
    sizes = read_architecture(tmp_path, "llama_moe")
    assert (sizes.num_experts, sizes.num_experts_per_tok, sizes.moe_intermediate_size) == (
        experts,
        selects,
        11_008 // experts,
    )
    found = count_parameters("llama_moe", sizes, 32_000)
    assert found.total == pytest.approx(6.74e9, rel=0.001)
    assert found.active == pytest.approx(active, rel=0.02)
