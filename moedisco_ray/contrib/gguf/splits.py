"""How a byte-level BPE splits text before it merges, under the names of llama.cpp.

The name is found from the tokenizer's own rules, so that tokenizers that a run trained are recognised too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.errors import ConfigError

_WORDS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_QWEN35 = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_REST}"
_NUMBERS = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}"
_TEKKEN = rf"{_WORDS}|{_CAPITALS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_GPT4O = rf"{_WORDS}{_ENDINGS}?|{_CAPITALS}{_ENDINGS}?|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}"
_ASCII = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_MARKED = rf"{_ASCII}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_REST}"
_DEEPSEEK = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _MARKED)
_SPLITS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_NUMBERS,), True): "llama-bpe",
    ((_NUMBERS,), False): "dbrx",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
    ((_GPT4O,), True): "gpt-4o",  # of gpt-oss, whose merges make every word of its vocabulary
    (_DEEPSEEK, False): "deepseek-v3",
}
"""Names of the regular expressions that split text one after the other, by the expressions and by whether known words
are not merged."""
KNOWN = frozenset({"gpt-2", "smollm", *_SPLITS.values()})
"""Names that `split_name` can find."""
_NO_NORMALISATION = {"type": "Sequence", "normalizers": []}
_REMEDY = "use `--to hf`, or a tokenizer that `tokenizer.train_vocab_size` trains"


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
    if normalizer is not None and normalizer["type"] != "NFC" and normalizer != _NO_NORMALISATION:
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
    isolated = all(kind == "Split" for kind in kinds) and all(
        each["behavior"] == "Isolated" and not each["invert"] for each in before
    )
    if not isolated or last["use_regex"]:
        return None
    # A line's end is written by its name in some files, and as itself in others.
    patterns = tuple(_as_written(each["pattern"].get("Regex", "")) for each in before)
    return _SPLITS.get((patterns, ignore_merges))


def _as_written(pattern: str) -> str:
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _described(steps: list[dict[str, Any]]) -> str:
    return ", ".join(str(each.get("pattern", {}).get("Regex") or each["type"]) for each in steps)
