"""How large the vocabulary will be, before a tokeniser is loaded or trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moedisco_ray.config import LocalInit, RunConfig
from moedisco_ray.errors import ConfigError


def planned_vocab_size(config: RunConfig) -> int:
    """Rows of the embedding that the run will have.

    Raises:
        ConfigError: The tokeniser has more tokens than the model has rows, or cannot be read.
        CheckpointError: The directory that `model.init` names holds no start for the family.
    """
    rows = config.model.architecture.vocab_size
    from_checkpoint = isinstance(config.model.init, LocalInit)
    if config.tokenizer.path is not None:
        tokens = tokenizer_vocab_size(config.tokenizer.path)
    elif from_checkpoint and rows is not None:
        return rows
    else:
        tokens = config.tokenizer.train_vocab_size
    if rows is not None and tokens > rows:
        way_out = "use the checkpoint's tokeniser" if from_checkpoint else "raise it, or leave it out"
        raise ConfigError("model.config.vocab_size", rows, f"is less than the tokeniser's {tokens} tokens; {way_out}")
    return rows or tokens


def tokenizer_vocab_size(directory: Path) -> int:
    """One more than the largest token id in a directory's `tokenizer.json`, or `vocab.json`.

    Raises:
        ConfigError: Neither file is there, or it is not a tokeniser's.
    """
    for name in ("tokenizer.json", "vocab.json"):
        path = directory / name
        if path.exists():
            try:
                return 1 + max(_token_ids(json.loads(path.read_text(encoding="utf-8"))))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError("tokenizer.path", str(directory), f"{name} is not a tokeniser's") from error
    raise ConfigError("tokenizer.path", str(directory), "holds neither tokenizer.json nor vocab.json")


def _token_ids(content: dict[str, Any]) -> list[int]:
    if "model" not in content:
        return list(content.values())  # vocab.json: from token to id
    vocabulary = content["model"]["vocab"]
    # A unigram model lists its tokens in order of id; every other maps tokens to ids.
    ids = list(range(len(vocabulary))) if isinstance(vocabulary, list) else list(vocabulary.values())
    return ids + [token["id"] for token in content.get("added_tokens") or ()]
