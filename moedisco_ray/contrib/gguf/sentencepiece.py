"""A SentencePiece tokenizer in a GGUF file: a BPE of characters, with bytes for characters that it does not know.

llama.cpp has no merges for this kind. Of all neighbours that together are a token, it joins those whose token has the
highest score. So the order of the merges gives the scores, if every such pair is a merge, as in tokenizers that
transformers converts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.errors import ConfigError

BYTES = frozenset(f"<0x{value:02X}>" for value in range(256))
"""Tokens of single bytes."""
_SPACE = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_METASPACE = {"type": "Metaspace", "replacement": _SPACE, "split": False}
_REMEDY = "use `--to hf`"
_UNUSUAL = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")


def is_sentencepiece(backend: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` is of this kind."""
    return backend["model"]["type"] == "BPE" and bool(backend["model"].get("byte_fallback"))


def adds_space(backend: Mapping[str, Any]) -> bool:
    """Whether a tokenizer puts a space before a text.

    Raises:
        ConfigError: It changes or splits text in another way than to mark its spaces.
    """
    normalizer, splits = backend["normalizer"] or {"type": "Sequence", "normalizers": []}, backend["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    if splits is None and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return _PREPEND in steps
    if not steps and splits in [_METASPACE | {"prepend_scheme": each} for each in ("always", "first", "never")]:
        return bool(splits["prepend_scheme"] != "never")
    found = ", ".join(str(each["type"]) for each in [*steps, *([splits] if splits else [])])
    raise ConfigError("tokenizer", found, f"changes or splits text in a way that llama.cpp does not know; {_REMEDY}")


def token_scores(backend: Mapping[str, Any]) -> dict[str, float]:
    """Score of each token that merges make: the earlier its merges, the higher.

    Raises:
        ConfigError: No scores have the effect of the merges, or the vocabulary lacks a byte.
    """
    model = backend["model"]
    vocabulary, added = model["vocab"].keys(), {each["content"] for each in backend["added_tokens"]}
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    joined = (left + right for left, right in merges)
    made = [token for token, _ in itertools.groupby(joined)]
    known = set(merges)
    if not vocabulary >= BYTES or any(model.get(name) for name in _UNUSUAL):
        raise ConfigError("tokenizer", "BPE", f"is no SentencePiece tokenizer that llama.cpp knows; {_REMEDY}")
    for token in vocabulary - added:
        for at in range(1, len(token)):
            pair = token[:at], token[at:]
            if pair not in known and all(len(part) == 1 or part in vocabulary for part in pair):
                raise ConfigError("tokenizer", " ".join(pair), f"is no merge, but llama.cpp would merge it; {_REMEDY}")
    if len(set(made)) < len(made):
        raise ConfigError("tokenizer", "BPE", f"has merges in an order that llama.cpp cannot follow; {_REMEDY}")
    return {token: -float(rank) for rank, token in enumerate(made)}
