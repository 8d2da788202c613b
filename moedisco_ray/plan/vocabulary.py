"""Size of the vocabulary, before a tokenizer is loaded or trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import LocalInit, RunConfig
from moedisco_ray.core.config.start_files import named_tokenizer
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.read_roots import opened

_COUNTED = ("tokenizer.json", "vocab.json")


def planned_vocab_size(config: RunConfig) -> int:
    """Rows of the embedding of the run.

    Raises:
        ConfigError: The tokenizer has more tokens than the model has rows, or cannot be read.
        CheckpointError: The directory in `model.init` holds no model that the family can start from.
    """
    rows, path = config.model.architecture.vocab_size, named_tokenizer(config.tokenizer)
    from_checkpoint = isinstance(config.model.init, LocalInit)
    if rows is not None and from_checkpoint and not config.tokenizer.replace:
        return rows
    if rows is not None and path is not None and not any((path / name).exists() for name in _COUNTED):
        return rows  # the tokens of other file formats are counted later, when transformers loads the tokenizer
    tokens = config.tokenizer.train_vocab_size if path is None else tokenizer_vocab_size(path)
    if rows is not None and tokens > rows:
        way_out = "use the checkpoint's tokenizer" if from_checkpoint else "raise it, or leave it out"
        raise ConfigError("model.config.vocab_size", rows, f"is less than the tokenizer's {tokens} tokens; {way_out}")
    return rows or tokens


def tokenizer_vocab_size(directory: Path) -> int:
    """Largest token id in `tokenizer.json` or `vocab.json`, plus 1.

    Raises:
        ConfigError: Neither file exists, or the one that exists is not a tokenizer.
    """
    for name in _COUNTED:
        path = directory / name
        if path.exists():
            try:
                with opened(path) as found:
                    return 1 + max(_token_ids(json.loads(found.read_text(encoding="utf-8"))))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                remedy = f"{name} is not a tokenizer file; name another directory"
                raise ConfigError("tokenizer.path", str(directory), remedy) from error
    raise ConfigError(
        "tokenizer.path",
        str(directory),
        "holds neither tokenizer.json nor vocab.json, so its size is not known before it is loaded; set "
        "model.config.vocab_size",
    )


def _token_ids(content: dict[str, Any]) -> list[int]:
    if "model" not in content:
        return list(content.values())  # `vocab.json` maps tokens to ids
    vocabulary = content["model"]["vocab"]
    # A unigram model lists its tokens in order of id; every other kind of model maps tokens to ids.
    ids = list(range(len(vocabulary))) if isinstance(vocabulary, list) else list(vocabulary.values())
    return ids + [token["id"] for token in content.get("added_tokens") or ()]
