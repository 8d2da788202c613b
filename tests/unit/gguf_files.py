"""GGUF files of tiny Llama models, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from moedisco_ray.contrib.gguf.reading import frequency_divisors
from moedisco_ray.contrib.gguf.rotation import add_rotation

TEXT = ["def f(x):\n    return x**2  # Größe\n", "the quick brown fox jumps over the lazy dog, and it's 12345 times"]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama(directory: Path, *, tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    """A Llama with random weights, with the vocabulary of `byte_level_bpe`."""
    config = LlamaConfig(
        vocab_size=len(byte_level_bpe(directory).get_vocab()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def byte_level_bpe(directory: Path) -> ByteLevelBPETokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        TEXT, vocab_size=300, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.save_model(str(directory))
    return tokenizer


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    pre: str = "gpt-2",
    fields: Mapping[str, float] | None = None,
) -> None:
    """Write a model with the tokenizer next to the file, which splits text as `pre` says, and further fields.

    Matrices are quantised to `kind`.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_rotation(writer, config.rope_parameters)
    for field, value in (fields or {}).items():
        writer.add_float32(f"llama.{field}", value)
    divisors = frequency_divisors(config.to_dict())
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    ids = byte_level_bpe(path.parent).get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(ids) - 1)])
    writer.add_token_merges((path.parent / "merges.txt").read_text(encoding="utf-8").splitlines()[1:])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(value=False)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    for key, tensor in model.state_dict().items():
        if key in model.all_tied_weights_keys:
            continue
        name, _, ending = key.rpartition(".")
        weight = tensor
        # llama.cpp rotates neighbouring pairs of a head, transformers its halves
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
        if name in OUTER:
            stored = OUTER[name]
        else:
            _, _, layer, inner = name.split(".", 3)
            stored = f"blk.{layer}.{NAMES[inner]}"
        used = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.numpy(), used)
        writer.add_tensor(f"{stored}.{ending}", data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
