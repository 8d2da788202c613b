"""GGUF files of exported models: llama.cpp and transformers compute with them what the model computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import torch
from gguf_files import TEXT
from moe_models import built
from small_run import small_config
from tiny_export import write_model, write_weights
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from typer.testing import CliRunner

from docs.ecosystem import FAMILY
from moedisco_ray.cli.app import app
from moedisco_ray.contrib.gguf.file import write_gguf
from moedisco_ray.contrib.gguf.splits import split_name
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import open_checkpoint, specialise

DENSE_FIRST = {
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "routed_scaling_factor": 2.5,
}
GROUPS = {"n_group": 2, "topk_group": 1}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name, family in DECLARATIONS.items() if family.gguf is not None),
    ("qwen2_moe", {"tie_word_embeddings": True, "qkv_bias": False}),
    ("qwen3_moe", {"tie_word_embeddings": True, "head_dim": 24, "rope_parameters": YARN}),
    ("mixtral", {"head_dim": 32, "rope_parameters": LLAMA3}),
    ("mixtral", {"rope_parameters": LINEAR}),
    (
        "deepseek_v2",
        {**DENSE_FIRST, "q_lora_rank": 16, "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    (
        "deepseek_v3",
        {
            **DENSE_FIRST,
            **GROUPS,
            "n_shared_experts": 2,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    ("glm4_moe", {**DENSE_FIRST, **GROUPS, "attention_bias": True, "use_qk_norm": True}),
    ("dots1", {**DENSE_FIRST, **GROUPS, "n_shared_experts": 2, "head_dim": 24, "tie_word_embeddings": True}),
    ("gpt_oss", {"sliding_window": 8, "rope_parameters": YARN}),
    (
        "qwen3_next",
        {"tie_word_embeddings": True, "head_dim": 32, "linear_num_key_heads": 3, "linear_conv_kernel_dim": 3},
    ),
    (
        "qwen3_next",
        {
            "full_attention_interval": 3,
            "num_hidden_layers": 4,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    (
        "qwen3_5_moe_text",
        {"tie_word_embeddings": True, "head_dim": 32, "linear_num_key_heads": 3, "linear_conv_kernel_dim": 3},
    ),
    (
        "qwen3_5_moe_text",
        {
            "full_attention_interval": 3,
            "num_hidden_layers": 4,
            "rope_parameters": LINEAR
            | {"partial_rotary_factor": 0.5, "mrope_section": [1, 2, 1], "mrope_interleaved": True},
        },
    ),
    (
        "ernie4_5_moe",
        {
            "moe_layer_start_index": 1,
            "num_hidden_layers": 3,
            "moe_layer_end_index": 2,
            "intermediate_size": 24,
            "moe_num_shared_experts": 2,
            "tie_word_embeddings": True,
        },
    ),
]


@pytest.mark.ecosystem("Use: GGUF file in llama.cpp", "xllamacpp")
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_llama_cpp_computes_what_the_model_computes(
    family: str, changes: dict[str, Any], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property(FAMILY, family)
    config = write_model(tmp_path, family, **changes)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    # In float64, so that only llama.cpp's rounding counts, which depends on the processor.
    model = specialise(built(config, open_checkpoint(tmp_path))).double()
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT[0])["input_ids"][:23]
    prompts = [ids[:length] for length in range(1, len(ids) + 1, 2)]
    likely, continued = llama_cpp.logprobs(tmp_path / "tiny.gguf", prompts, count=12)
    compared = 0
    for prompt, found in zip(prompts, likely, strict=True):
        if found:
            with torch.no_grad():
                expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).float()
            assert torch.allclose(
                torch.tensor([found[token] for token in range(config["vocab_size"])]), expected, atol=1e-4
            )
            compared += 1
    assert compared >= 3
    ids = prompts[-1]
    for token in continued:
        with torch.no_grad():
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax()
        ids = [*ids, token]


@pytest.mark.ecosystem("Use: GGUF file in transformers", "transformers", "gguf")
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "qwen3_5_moe_text"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transformers_reads_the_same_model_and_tokenizer(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = write_model(tmp_path, family, dtype)
    written = AutoTokenizer.from_pretrained(tmp_path)
    written.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    written.save_pretrained(tmp_path)
    alone = tmp_path / "alone"  # transformers would read the files next to it too
    alone.mkdir()
    write_gguf(tmp_path, alone / "tiny.gguf", name="tiny")
    # transformers reads no sizes of experts from GGUF files, so it needs the configuration.
    read = AutoModelForCausalLM.from_pretrained(
        alone, gguf_file="tiny.gguf", config=AutoConfig.from_pretrained(tmp_path), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="tiny.gguf")
    ids = torch.tensor([written(TEXT[0])["input_ids"]])
    expected = built(config, {key: tensor.float() for key, tensor in open_checkpoint(tmp_path).items()})
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, expected(ids).logits, atol=1e-4, rtol=0)
    assert tokenizer.chat_template == written.chat_template
    assert tokenizer.eos_token_id == written.eos_token_id
    for text in TEXT:
        assert tokenizer(text)["input_ids"] == written(text)["input_ids"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_keep_their_dtype_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3_moe", dtype)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    weights = open_checkpoint(tmp_path)
    experts = torch.stack([weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(4)])
    stored = found["blk.1.ffn_down_exps.weight"]
    assert stored.tensor_type.name == {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert stored.data.tobytes() == experts.view(torch.uint8).numpy().tobytes()
    norm = found["blk.1.attn_norm.weight"]
    assert norm.data.dtype == np.float32
    assert torch.equal(torch.from_numpy(norm.data.copy()), weights["model.layers.1.input_layernorm.weight"].float())


def test_norms_and_rates_of_decay_are_computed_in_fp32(tmp_path: Path) -> None:
    write_model(tmp_path, "qwen3_next", torch.bfloat16)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    found = {
        tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    }
    weights = open_checkpoint(tmp_path)
    assert torch.equal(found["blk.0.attn_norm.weight"], 1 + weights["model.layers.0.input_layernorm.weight"].float())
    assert torch.equal(found["blk.0.ssm_a"], -weights["model.layers.0.linear_attn.A_log"].float().exp())
    assert torch.equal(found["blk.0.ssm_norm.weight"], weights["model.layers.0.linear_attn.norm.weight"].float())
    assert torch.equal(
        found["blk.0.ssm_conv1d.weight"], weights["model.layers.0.linear_attn.conv1d.weight"][:, 0].float()
    )


MARKS = "នេះ ?"
"""Letters with marks, which llama.cpp splits off under the names `tekken` and `gpt-4o`."""
HARD = [
    "\n \n\n \n\n\n \t \t\t \t\n  \n   🚀 (normal) 😶\u200d🌫️ ✅ 3 33 333 3333 33333 3.3 3..3",
    "I've told HE'S there, 'RE you Sure? we'LL, CamelCase",
    "?我想在apple工作1314151天 ------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!",
    "  def f(x):\r\n\treturn x**2 / 17  # Größe",
]
SPLITS = {
    "qwen2": "qwen2",
    "qwen35": "qwen35",
    "llama-bpe": "llama3",
    "dbrx": "llama3",
    "tekken": "tekken",
    "gpt-4o": "gpt-4o",
}


def test_every_chat_template_of_a_tokenizer_is_kept(tmp_path: Path) -> None:
    write_model(tmp_path, "mixtral")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    assert {name: field.contents() for name, field in fields.items() if "chat_template" in name} == {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "{{ tools }}",
    }


def tokenizer_of(name: str) -> Tokenizer:
    """A byte-level BPE that splits text as llama.cpp does under a name."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name in {"llama-bpe", "tekken"}))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in {"gpt-2", "smollm"})
    first = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*first[name], level]
        if name in first
        else [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[SPLITS[name]]), behavior="isolated"), level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [MARKS, *HARD, *TEXT] * 4,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


@pytest.mark.ecosystem("Use: GGUF file in llama.cpp", "xllamacpp")
@pytest.mark.parametrize("name", ["gpt-2", "smollm", *SPLITS])
@pytest.mark.parametrize("with_bos", [False, True])
def test_llama_cpp_encodes_text_as_the_tokenizer_does(name: str, with_bos: bool, tmp_path: Path) -> None:
    plain = tokenizer_of(name)
    if with_bos:
        plain.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert split_name(json.loads(plain.to_str())) == name
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        additional_special_tokens=["<|im_end|>"],
    )
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path)
    write_weights(tmp_path, "qwen3_moe")
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    texts = [*HARD, *TEXT, *([] if name in {"tekken", "gpt-4o"} else [MARKS]), "a<think>b", "a<|im_end|>b"]
    assert llama_cpp.encoded(tmp_path / "tiny.gguf", texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_other_tokenizers_are_refused_in_one_line() -> None:
    plain = tokenizer_of("gpt-2")
    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("x+"), "isolated"),
            pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False),
        ]
    )
    with pytest.raises(
        ConfigError, match=r"^tokenizer: 'x\+, ByteLevel': splits text in a way that llama\.cpp does not know; use"
    ):
        split_name(json.loads(plain.to_str()))
    plain = tokenizer_of("gpt-2")
    plain.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match=r"^tokenizer: 'Lowercase': is a normalisation"):
        split_name(json.loads(plain.to_str()))
    with pytest.raises(ConfigError, match=r"^tokenizer: 'WordPiece': is no byte-level BPE"):
        split_name(json.loads(Tokenizer(models.WordPiece()).to_str()))


@pytest.mark.parametrize(
    ("family", "changes", "line"),
    [
        ("flex_olmo", {}, "model_type: 'flex_olmo': llama.cpp does not know it; use `--to hf`, or one of mixtral, "),
        (
            "qwen2_moe",
            {"norm_topk_prob": True},
            "norm_topk_prob: True: llama.cpp runs qwen2_moe only with False; use `--to hf`",
        ),
        (
            "olmoe",
            {"num_key_value_heads": 1},
            "num_key_value_heads: 1: llama.cpp runs olmoe only with 2; use `--to hf`",
        ),
        (
            "dots1",
            {"num_key_value_heads": 1},
            "num_key_value_heads: 1: llama.cpp runs dots1 only with 2; use `--to hf`",
        ),
        (
            "qwen3_moe",
            {"mlp_only_layers": [1], "intermediate_size": 8},
            "has a dense layer after an MoE layer, which llama.cpp",
        ),
        (
            "qwen3_moe",
            {"rope_parameters": LLAMA3},
            "rope_type: 'llama3': llama.cpp does not scale positions of qwen3_moe this way",
        ),
        (
            "qwen3_5_moe_text",
            {"linear_value_head_dim": 12},
            "linear_value_head_dim: 12: llama.cpp runs qwen3_5_moe_text only with 8;",
        ),
        (
            "llama_moe",
            {},
            "model_type: 'llama_moe': llama.cpp has only routers of one layer; use `--to hf`, or one of mixtral, ",
        ),
        ("deepseek_v3", {"rope_parameters": YARN}, "llama.cpp needs the same factor for both; use `--to hf`"),
        (
            "gpt_oss",
            {"rope_parameters": YARN | {"truncate": False}},
            "rope_parameters: 'truncate': is a parameter that GGUF files",
        ),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    family: str, changes: dict[str, Any], line: str, tmp_path: Path
) -> None:
    write_model(tmp_path, family, **changes)
    with pytest.raises(CheckpointError, match=re.escape(line)):
        write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    assert not (tmp_path / "tiny.gguf").exists()


@pytest.mark.slow
@pytest.mark.ecosystem("Use: GGUF file in llama.cpp", "xllamacpp")
def test_a_finished_run_becomes_a_file_that_writes_what_its_export_writes(tmp_path: Path) -> None:
    config = small_config(tmp_path / "runs", tokens={"total": 8_000, "seed_share": 0.0, "finetune_share": 0.4})
    directory = pipeline.run(config, backend=LocalBackend())
    file = tmp_path / "small.gguf"
    result = CliRunner().invoke(app, ["export", str(directory), "--to", "gguf", "--output", str(file), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {
        "path": str(file),
        "bytes": file.stat().st_size,
        "step": None,
        "parameters": json.loads((directory / "model" / "manifest.json").read_text())["summary"]["parameters"],
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "small.gguf"]
    model, tokenizer = (kind.from_pretrained(directory / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer("def f(x):", return_tensors="pt", return_token_type_ids=False)["input_ids"]
    expected = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    _, found = llama_cpp.logprobs(file, [ids[0].tolist()], count=16)
    assert found == expected[: len(found)]
    assert len(found) >= len(expected) - 1  # llama.cpp leaves out the end of the text
    again = CliRunner().invoke(app, ["export", str(directory / "model"), "--to", "gguf", "--output", str(file)])
    assert again.exit_code == 2
    assert "--output" in again.output
    assert "exists already; choose another file" in again.output
    (tmp_path / "file").write_text("")
    below = CliRunner().invoke(
        app, ["export", str(directory), "--to", "gguf", "--output", str(tmp_path / "file" / "x.gguf")]
    )
    assert below.exit_code == 2
    assert "is not a directory; choose another" in below.output
