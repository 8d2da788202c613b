"""A tokenizer in a GGUF file: a byte-level BPE, or one of SentencePiece's kind.

llama.cpp knows by name how a byte-level BPE splits text before it merges; see `splits`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

import gguf
from transformers import PreTrainedTokenizerBase

from moedisco_ray.contrib.gguf.sentencepiece import BYTES, adds_space, is_sentencepiece, token_scores
from moedisco_ray.contrib.gguf.splits import split_name
from moedisco_ray.core.errors import ConfigError

_LOWEST = -1e6
"""Score of tokens that no merge makes, below all others."""
_ENDS_BY_NAME = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"})
"""Tokens that llama.cpp takes for ends of a text by their names."""


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, ends: Collection[int] = ()
) -> None:
    """Add vocabulary, merges, special tokens and chat template.

    Args:
        writer: Writer of the file.
        tokenizer: A byte-level BPE, or a tokenizer of SentencePiece's kind.
        vocab_size: Number of rows of the embedding; rows without a token get a name that no text contains.
        ends: Tokens that end a text, in addition to the tokenizer's EOS.

    Raises:
        ConfigError: The tokenizer is of another kind, llama.cpp does not know how it splits text, or a file cannot name
            all tokens that end a text.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {each["id"]: bool(each["special"]) for each in backend["added_tokens"]}
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(vocab_size)])
    kinds = [_kind(number, names, added) for number in range(vocab_size)]
    if is_sentencepiece(backend):
        scores = token_scores(backend)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(adds_space(backend))
        writer.add_token_scores([scores.get(names.get(number, ""), _LOWEST) for number in range(vocab_size)])
        kinds = [gguf.TokenType.BYTE if names.get(number) in BYTES else kind for number, kind in enumerate(kinds)]
        if tokenizer.unk_token_id is not None:
            writer.add_unk_token_id(tokenizer.unk_token_id)
            kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split_name(backend))
        merges = backend["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_token_types(kinds)
    _add_special_tokens(writer, tokenizer, ends)
    templates = tokenizer.chat_template
    if templates is not None:
        writer.add_chat_template(
            templates
            if isinstance(templates, str)
            else [{"name": name, "template": text} for name, text in templates.items()]
        )


def _kind(number: int, names: Mapping[int, str], added: Mapping[int, bool]) -> gguf.TokenType:
    if number not in names:
        return gguf.TokenType.UNUSED
    if number not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[number] else gguf.TokenType.USER_DEFINED


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    encoded = tokenizer("a")["input_ids"]
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None and encoded[0] == bos)
    writer.add_eos_token_id(eos)
    writer.add_add_eos_token(encoded[-1] == eos)
    if pad is not None:
        writer.add_pad_token_id(pad)
    # By names llama.cpp knows some; a file names two more.
    others = sorted({*ends} - {eos}, key=lambda end: (tokenizer.convert_ids_to_tokens(end) in _ENDS_BY_NAME, end))
    unnamed = [end for end in others[2:] if tokenizer.convert_ids_to_tokens(end) not in _ENDS_BY_NAME]
    if unnamed:
        raise ConfigError(
            "generation_config.json: eos_token_id",
            sorted(ends),
            "are more tokens that end a text than a GGUF file can name; use `--to hf`, or remove some",
        )
    for end, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(end)
