"""Checkpoints whose weights are published in 4 bits (gpt-oss) or in fp8 (DeepSeek-V3) are starts, read in bf16."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pinned_runs
import pytest
import torch
from published_starts import DEEPSEEK_V3, GPT_OSS, write_deepseek_v3, write_gpt_oss
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from moedisco_ray.core.config import Model, check_config
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families.quantisation import Quantisation
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.validation import validate
from moedisco_ray.models import open_checkpoint, read_config
from moedisco_ray.models.checkpoint import open_file
from moedisco_ray.models.quantised import dequantised
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.plan import count_parameters

WRITERS: dict[str, Callable[..., Path]] = {"gpt_oss": write_gpt_oss, "deepseek_v3": write_deepseek_v3}
THEIRS = {"gpt_oss": Mxfp4Config(dequantize=True), "deepseek_v3": FineGrainedFP8Config(dequantize=True)}
TOKENS = torch.arange(32).reshape(2, 16).mul(7) % GPT_OSS["vocab_size"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("family", WRITERS)
def test_the_start_computes_what_transformers_computes_with_it_dequantised(family: str, tmp_path: Path) -> None:
    start = WRITERS[family](tmp_path / "start")
    theirs = AutoModelForCausalLM.from_pretrained(
        start, dtype=torch.bfloat16, quantization_config=THEIRS[family]
    ).eval()
    expected = logits(theirs)
    for few_tokens in (False, True):  # a stack of experts is read as a whole, or one expert of it
        model = open_streamed(start, dtype=torch.bfloat16, resident=False, few_tokens=few_tokens)
        assert torch.equal(logits(model), expected)
    stored = open_checkpoint(start)
    section = with_start(Model.model_validate({"init": {"checkpoint": str(start)}}))
    planned = count_parameters(family, section.architecture, stored.config["vocab_size"])
    assert planned.total == sum(parameter.numel() for parameter in theirs.parameters())
    assert {stored.dtype(key) for key in stored if not stored.model_map.keeps_dtype(key)} == {torch.bfloat16}
    assert not any(key.startswith("model.layers.2.") for key in stored)
    assert "quantization_config" not in read_config(start)


@pytest.mark.parametrize(("family", "pool"), [("gpt_oss", {}), ("deepseek_v3", {"memory": "streamed"})])
def test_a_run_at_a_rate_of_zero_gives_the_dequantised_start_back(
    family: str, pool: dict[str, Any], tmp_path: Path
) -> None:
    raw = pinned_runs.config_of("olmoe", tmp_path).model_dump(mode="json", exclude={"model": {"config"}})
    start = tmp_path / "quantised"
    WRITERS[family](start, vocab_size=pinned_runs.write_tokenizer(start, tmp_path / "text"))
    raw["model"] |= {"family": None, "init": {"checkpoint": str(start)}}
    raw["tokens"] |= {"total": 4_000, "seed_share": 0.0, "finetune_share": 1.0}
    raw["clusters"]["count"], raw["merge"]["router"] = 1, None
    raw["finetune"]["optimizer"]["lr"] = 1e-30
    raw["pools"]["high_memory"] |= pool
    config = check_config(raw)
    assert not validate(config).problems
    directory = pipeline.run(config, backend=LocalBackend())
    expected, model = open_checkpoint(start), directory / "model"
    found = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # The step is not lost in a zero, of which there are many in 4 bits.
        assert torch.allclose(tensor.float(), found[name].float(), rtol=0, atol=1e-25), name
    values = json.loads((model / "config.json").read_text())
    assert "quantization_config" not in values
    assert values["dtype"] == "bfloat16"
    exported = AutoModelForCausalLM.from_pretrained(model).eval()
    assert exported.dtype == torch.bfloat16
    assert torch.equal(logits(exported), logits(open_streamed(start, dtype=torch.bfloat16)))


def test_blocks_at_the_edge_of_a_matrix_are_smaller(tmp_path: Path) -> None:
    """DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows."""
    torch.manual_seed(0)
    stacks = {"w": torch.randn(2, 5, 7), "x": torch.randn(5, 7), "y": torch.randn(2, 3)}
    scales = {"w": torch.rand(2, 3, 3), "x": torch.rand(3, 3), "y": torch.tensor([[2.0]]).to(torch.float8_e8m0fnu)}
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stacks.items()}
    save_file(tensors | {f"{name}_scale_inv": each for name, each in scales.items()}, tmp_path / "fp8")
    file = open_file(tmp_path / "fp8")
    found = dequantised(dict.fromkeys(file.keys(), file), Quantisation((2, 3)))
    for name, tensor in tensors.items():
        expected = _dequantize_fp8_weight(tensor, scales[name].float(), [2, 3], torch.float32).bfloat16()
        assert torch.equal(found[name].get_tensor(name), expected)
    assert torch.equal(found["w"][1, slice(1, 3)], found["w"].get_tensor("w")[1, 1:3])


def test_a_scale_of_a_whole_tensor(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4).to(torch.float8_e4m3fn)
    save_file({"w": tensor, "w_scale_inv": torch.tensor(0.5), "a.activation_scale": torch.ones(1)}, tmp_path / "fp8")
    file = open_file(tmp_path / "fp8")
    [found] = dequantised(dict.fromkeys(file.keys(), file), Quantisation()).values()
    assert torch.equal(found.get_tensor("w"), (tensor.float() / 2).bfloat16())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "gptq"}, "quantised by 'gptq'; mxfp4 "),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "quantised by 'compressed-tensors'; mxfp4",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"in blocks of \[128\]; mxfp4"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, "do not belong together"),
        ({"quant_method": "mxfp4"}, "weight_scales': is missing"),
    ],
)
def test_other_quantisations_are_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    start = write_deepseek_v3(tmp_path)
    (start / "config.json").write_text(json.dumps(DEEPSEEK_V3 | {"quantization_config": changes}))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(start)
    if "; mxfp4" in words:
        with pytest.raises(CheckpointError, match=words):
            with_start(Model.model_validate({"init": {"checkpoint": str(start)}}))


@pytest.mark.parametrize(
    ("missing", "family"), [("_scales", "gpt_oss"), ("_blocks", "gpt_oss"), ("_scale_inv", "deepseek_v3")]
)
def test_half_of_a_quantised_tensor_is_refused(missing: str, family: str, tmp_path: Path) -> None:
    start = WRITERS[family](tmp_path)
    weights = json.loads((start / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in weights if name.endswith(missing))
    tensors = load_file(start / weights[name])
    del tensors[name]
    save_file(tensors, start / weights[name])
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(start)


def resident(line: str) -> int:
    """Memory of this process now (VmRSS) or its peak (VmHWM), in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{line}:")[2].split()[0])


def test_reading_takes_less_memory_than_one_and_a_half_files(tmp_path: Path) -> None:
    """Experts are as large a part of the file as in gpt-oss-120b: a stack has 23 % of it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_local_experts": 32, "num_hidden_layers": 4}
    layers = ["sliding_attention", "full_attention"] * 2
    start = write_gpt_oss(tmp_path, files=1, **sizes, layer_types=layers)
    size = max(path.stat().st_size for path in start.glob("*.safetensors"))
    assert size > 200e6
    stored = open_checkpoint(start)
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts as free
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _, tensor in stored.stream():
        tensor.view(-1)[::2048].sum()
    assert 0.5 * size < resident("VmHWM") - before < 1.5 * size
