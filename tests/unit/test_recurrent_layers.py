"""What only families with recurrent layers have: kinds of layers, initial values, checkpoints in larger models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import LENGTH, MIXED, VOCAB, random_tensors, tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5Tokenizer,
)
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from moedisco_ray.core.config import Architecture, Model, RunConfig, check_config, read_architecture
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import (
    canonical_shapes,
    check_same,
    hf_config,
    load_model,
    open_checkpoint,
    random_weights,
    read_config,
)
from moedisco_ray.models.checks import check_start_tensors, open_complete
from moedisco_ray.plan import count_parameters
from moedisco_ray.plan.parameters import CHUNK
from moedisco_ray.stages.text.pretrained import check_tokenizer

FAMILY = "qwen3_5_moe_text"
RECURRENT = [name for name, page in DECLARATIONS.items() if page.recurrence is not None]
TOKENS = torch.arange(2 * LENGTH).reshape(2, LENGTH).mul(7) % VOCAB
KINDS = ["linear_attention", "linear_attention", "full_attention"]
NEXT = {
    "num_hidden_layers": 48,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "vocab_size": 151_936,
    "decoder_sparse_step": 1,
}
QWEN_3_5 = {"num_hidden_layers": 40, "num_experts": 256, "num_experts_per_tok": 8, "vocab_size": 248_320}
SIZES = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": False,
}
"""Fields of the `config.json` of Qwen3-Next-80B-A3B and Qwen3.5-35B-A3B."""


def written(directory: Path, values: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize(
    ("family", "values", "total", "active"), [("qwen3_next", NEXT, 79.7e9, 3.9e9), (FAMILY, QWEN_3_5, 34.7e9, 3.5e9)]
)
def test_published_configurations_are_read(
    tmp_path: Path, family: str, values: dict[str, Any], total: float, active: float
) -> None:
    sizes = read_architecture(written(tmp_path, {"model_type": family, **SIZES, **values}), family)
    found = count_parameters(family, sizes, values["vocab_size"])
    assert found.total == pytest.approx(total, rel=0.01)
    assert found.active == pytest.approx(active, rel=0.02)
    assert found.recurrent_layers == values["num_hidden_layers"] * 3 // 4


@pytest.mark.parametrize("family", RECURRENT)
def test_kinds_of_layers_give_the_interval_of_attention(tmp_path: Path, family: str) -> None:
    values = {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "model_type": family, "num_hidden_layers": 7}
    found = read_architecture(written(tmp_path, {**values, "layer_types": KINDS * 2 + KINDS[:1]}), family)
    assert found.fields["full_attention_interval"] == 3, "transformers reads the kinds first, too"
    for kinds in (KINDS * 2 + KINDS[2:], ["sliding_attention", *KINDS * 2]):
        with pytest.raises(
            CheckpointError, match="layer_types: attention must be in every n-th layer, and no layer of another"
        ):
            read_architecture(written(tmp_path, {**values, "layer_types": kinds}), family)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"full_attention_interval": 5},
            "full_attention_interval 5: none of the 4 layers has attention; use at most 4",
        ),
        ({"full_attention_interval": 0}, "full_attention_interval 0: must be a whole number of at least 1"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads 6 is not a multiple of linear_num_key_heads 4"),
        ({"linear_key_head_dim": 0.5}, "linear_key_head_dim 0.5: must be a whole number of at least 1"),
    ],
)
def test_sizes_that_no_layer_can_have_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        check_config(
            {
                "name": "x",
                "corpus": {"sources": [{"path": "embedded"}]},
                "pools": {"low_memory": {}, "high_memory": {}},
                "model": {"family": FAMILY, "config": {"fields": fields}},
            }
        )


@pytest.mark.parametrize("family", RECURRENT)
def test_a_random_start_has_the_values_of_transformers(family: str) -> None:
    """Constants are equal, and random tensors have the same range or standard deviation."""
    sizes = Architecture(
        hidden_size=256, num_experts=2, fields={"linear_num_value_heads": 64, "linear_num_key_heads": 64}
    )
    config = hf_config(family, sizes, VOCAB, LENGTH, 0)
    theirs = AutoModelForCausalLM.from_config(config).state_dict()
    for name, ours in random_weights(config.to_dict(), 1).items():
        if ".experts." in name:
            continue
        if theirs[name].std() == 0:
            assert torch.equal(ours, theirs[name]), name
        elif name.endswith("A_log"):
            assert 0.01 <= float(ours.exp().min()) < 4
            assert 12 < float(ours.exp().max()) <= 16
        else:
            assert float(ours.std()) == pytest.approx(float(theirs[name].std()), rel=0.2), name


@pytest.fixture(scope="module")
def composite(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A model that reads images too, as transformers stores it, and the logits of its language model."""
    home = tmp_path_factory.mktemp("composite")
    text = tiny_config(FAMILY, 8)
    config = AutoConfig.for_model(
        "qwen3_5_moe",
        text_config=text,
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
        },
    )
    torch.manual_seed(3)
    model = Qwen3_5MoeForConditionalGeneration(config).eval()
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.3)
    model.save_pretrained(home)
    with torch.no_grad():
        return home, model(input_ids=TOKENS).logits


def projections(experts: dict[str, torch.Tensor], block: str, part: str) -> torch.Tensor:
    return torch.stack([experts[f"{block}.experts.{e}.{part}_proj.weight"] for e in range(8)])


def stacked(source: Path, target: Path) -> Path:
    """The same model with the experts of a layer in one tensor, and with a layer that predicts further tokens."""
    target.mkdir()
    found = load_file(source / "model.safetensors")
    experts = {name: found.pop(name) for name in list(found) if ".experts." in name}
    for block in {name.split(".experts.")[0] for name in experts}:
        gate, up, down = (projections(experts, block, part) for part in ("gate", "up", "down"))
        found[f"{block}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"{block}.experts.down_proj"] = down
    save_file(found | {"mtp.layers.0.mlp.gate.weight": torch.zeros(1)}, target / "model.safetensors")
    return written(target, json.loads((source / "config.json").read_text()))


@pytest.mark.parametrize("form", ["separate", "stacked", "text"])
def test_the_language_model_of_a_composite_model_is_a_start(
    composite: tuple[Path, torch.Tensor], tmp_path: Path, form: str
) -> None:
    source, expected = composite
    if form == "stacked":  # as published
        source = stacked(source, tmp_path / "stacked")
    elif form == "text":  # transformers keeps the prefix of the names
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "text")
        source = tmp_path / "text"
        assert any("language_model" in name for name in load_file(source / "model.safetensors"))
    section = with_start(Model.model_validate({"init": {"checkpoint": str(source)}}))
    assert section.family_name == read_config(source)["model_type"] == FAMILY
    assert section.architecture.num_experts == 8
    assert section.architecture.fields["full_attention_interval"] == 2
    check_start_tensors(section)
    stored, config = open_complete(source)
    assert config.model_type == FAMILY
    assert {key: stored.shape(key) for key in stored} == canonical_shapes(config)
    model = AutoModelForCausalLM.from_config(config).eval()
    check_same(dict(stored), dict(open_checkpoint(composite[0])))
    own = load_model(source).eval()
    assert own.config.model_type == model.config.model_type
    with torch.no_grad():
        assert torch.equal(own(TOKENS).logits, expected)


def test_quantised_weights_of_a_composite_model_are_refused(
    composite: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    values = {**json.loads((composite[0] / "config.json").read_text()), "quantization_config": {"quant_method": "awq"}}
    save_file(random_tensors(tiny_config(FAMILY, 8)), written(tmp_path / "awq", values) / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds weights quantised by 'awq'"):
        open_checkpoint(tmp_path / "awq")


def test_the_operations_of_a_recurrence_are_those_of_its_products() -> None:
    tokens, page = 2 * CHUNK, DECLARATIONS["qwen3_next"]
    sizes = Architecture(num_hidden_layers=2, fields=MIXED)
    heads, key, value = (MIXED[f"linear_{name}"] for name in ("num_value_heads", "key_head_dim", "value_head_dim"))
    q_BLHd, v_BLHd = torch.randn(1, tokens, heads, key), torch.randn(1, tokens, heads, value)
    with FlopCounterMode(display=False) as counter:
        torch_chunk_gated_delta_rule(
            q_BLHd, q_BLHd, v_BLHd, g=-torch.rand(1, tokens, heads), beta=torch.rand(1, tokens, heads)
        )
    solved = CHUNK * heads * (key + value)  # which the counter does not know
    found = count_parameters(page.name, sizes, VOCAB).recurrence_flops
    assert found == counter.get_total_flops() / tokens + solved


def test_the_tokenizer_must_be_one_that_transformers_reads_next_to_the_model(tmp_path: Path) -> None:
    """It reads all of them by the rules of Qwen3.5's, which split digits."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["2024 and 2025, 20242025 times"] * 9, vocab_size=300, min_frequency=1, show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="!").save_pretrained(tmp_path / "other")
    trained.save_model(str(tmp_path))
    merges = [tuple(line.split()) for line in (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    own = Qwen3_5Tokenizer(vocab=trained.get_vocab(), merges=merges, eos_token="!", unk_token="!", pad_token="!")
    own.save_pretrained(tmp_path / "own")

    def run(name: str | None) -> RunConfig:
        path = None if name is None else str(tmp_path / name)
        return check_config(
            {
                "name": "x",
                "corpus": {"sources": [{"path": "embedded"}]},
                "tokenizer": {"path": path},
                "model": {"family": FAMILY, "config": {"num_experts": 4, "vocab_size": 400}},
                "clusters": {"count": 2},
            }
        )

    for name in (None, "other"):
        with pytest.raises(
            ConfigError, match=r"^tokenizer\.path: .*transformers reads every tokenizer of qwen3_5_moe_text"
        ):
            check_tokenizer(run(name))
    check_tokenizer(run("own"))
