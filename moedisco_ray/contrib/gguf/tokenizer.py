"""A tokenizer in a GGUF file: a byte-level BPE, or one of SentencePiece's kind.

llama.cpp knows by name how a byte-level BPE splits text before it merges. The name is found from the tokenizer's own
rules, so that tokenizers that a run trained are recognised too.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from moedisco_ray.contrib.gguf.sentencepiece import BYTES, adds_space, is_sentencepiece, token_scores
from moedisco_ray.core.errors import ConfigError

_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_NUMBERS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_SPLITS: Mapping[tuple[str, bool], str] = {
    (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}", False): "qwen2",
    (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}",
        False,
    ): "qwen35",
    (_NUMBERS, True): "llama-bpe",
    (_NUMBERS, False): "dbrx",
    (rf"{_WORDS}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}", True): "tekken",
    (
        rf"{_WORDS}{_ENDINGS}?|{_CAPITALS}{_ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
        False,
    ): "gpt-4o",
}
"""Names of the regular expressions that split text, by expression and by whether known words are not merged."""
_LOWEST = -1e6
"""Score of tokens that no merge makes, below all others."""
_REMEDY = "use `--to hf`, or a tokenizer that `tokenizer.train_vocab_size` trains"


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
        ConfigError: The tokenizer is of another kind, or llama.cpp does not know how it splits text.
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


def split_name(backend: Mapping[str, Any]) -> str:
    """Name that llama.cpp has for the way in which a tokenizer splits text.

    Args:
        backend: A `tokenizer.json`.

    Raises:
        ConfigError: The tokenizer is no byte-level BPE, or llama.cpp has no such name.
    """
    model, normalizer = backend["model"], backend["normalizer"]
    if model["type"] != "BPE":
        raise ConfigError("tokenizer", model["type"], f"is no byte-level BPE; {_REMEDY}")
    # llama.cpp does not normalise; text that people write is in NFC already.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise ConfigError(
            "tokenizer", normalizer["type"], f"is a normalisation that llama.cpp does not know; {_REMEDY}"
        )
    found = backend["pre_tokenizer"] or {"type": None}
    steps = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    name = _steps_name(steps, ignore_merges=bool(model.get("ignore_merges")))
    if name is None:
        raise ConfigError(
            "tokenizer", _described(steps), f"splits text in a way that llama.cpp does not know; {_REMEDY}"
        )
    return name


def _steps_name(steps: list[dict[str, Any]], *, ignore_merges: bool) -> str | None:
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    kinds = [each["type"] for each in before]
    if last["use_regex"] and not ignore_merges:
        if kinds == ["Digits"] and before[0]["individual_digits"]:
            return "smollm"
        return None if kinds else "gpt-2"
    if kinds == ["Split"] and before[0]["behavior"] == "Isolated" and not before[0]["invert"] and not last["use_regex"]:
        return _SPLITS.get((before[0]["pattern"].get("Regex", ""), ignore_merges))
    return None


def _described(steps: list[dict[str, Any]]) -> str:
    return ", ".join(str(each.get("pattern", {}).get("Regex") or each["type"]) for each in steps)


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
    if others := sorted({*ends} - {eos}):
        writer.add_eot_token_id(others[0])
