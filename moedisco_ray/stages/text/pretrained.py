"""Prepare pretrained tokenizers for a run, and check that they fit its model.

This module imports transformers, which is slow. Workers that read text use only `Encoder`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from moedisco_ray.core.config import LocalInit, RunConfig, tokenizer_directory, tokenizer_files
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.families import DECLARATIONS, language_model
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.models.tokenizer_directories import (
    copy_tokenizer,
    difference,
    load_pretrained,
    reads_as,
    save_tokenizer,
)
from moedisco_ray.stages.text.tokenizer import (
    ENCODING,
    END_OF_TEXT,
    Encoder,
    Encoding,
    check_vocabulary,
    vocabulary_size,
    write_encoding,
)

_COMMON_EOS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""Common end-of-sequence tokens, for tokenizers that declare none."""


def prepare_tokenizer(source: Path, directory: Path, field: str = "tokenizer.path") -> None:
    """Copy a tokenizer's files unchanged, with its chat template, and write the encoding that workers use.

    A tokenizer without an end-of-sequence token gets a common one from its vocabulary, or `<|endoftext|>` is added. Its
    files are then saved again instead of copied.

    Args:
        source: Directory that `load_pretrained` can read.
        directory: Directory for the copy; made when absent.
        field: Setting that names the source; errors name it.

    Raises:
        ConfigError: The tokenizer cannot be loaded; see `load_pretrained`.
    """
    tokenizer = load_pretrained(source, field)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer.eos_token_id is not None:
        copy_tokenizer(source, tokenizer, directory)
    else:
        _ensure_eos(tokenizer, source)
        save_tokenizer(tokenizer, directory)
    write_encoding(encoding_of(tokenizer), directory)


def encoding_of(tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """Encoding of a loaded tokenizer, with BOS if and only if the tokenizer adds it before a text."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    bos = tokenizer.bos_token_id
    first, bare = (tokenizer("a", add_special_tokens=special)["input_ids"][:1] for special in (True, False))
    adds_bos = bos is not None and first == [bos] != bare
    return Encoding(
        plain.to_str(), int(tokenizer.eos_token_id), bos if adds_bos else None, vocabulary_size(tokenizer.get_vocab())
    )


def open_encoder(directory: Path, field: str = "tokenizer.path") -> Encoder:
    """Open the encoder of a prepared tokenizer directory or of any model directory.

    Raises:
        ConfigError: The tokenizer cannot be loaded; see `load_pretrained`.
    """
    if (directory / ENCODING).is_file():
        return Encoder(directory)
    tokenizer = load_pretrained(directory, field)
    _ensure_eos(tokenizer, directory)
    return Encoder(encoding_of(tokenizer))


def check_tokenizer(config: RunConfig) -> None:
    """Check that a run's tokenizer belongs to its model and fits it, before any text is read.

    Raises:
        ConfigError: One of these problems:

            - The tokenizer cannot be read.
            - It differs from the tokenizer of the model to start from, and `tokenizer.replace` is not set.
            - The model to start from has no tokenizer.
            - `model.config.vocab_size` is too small for the tokenizer.
            - transformers would read the finished model's tokenizer as another one.
        CheckpointError: The embedding of the model to start from is too small for the tokenizer.
    """
    directory, start = tokenizer_directory(config), config.model.init
    family = DECLARATIONS[config.model.family_name]
    if family.own_tokenizer and (directory is None or not _reads_as_of(family.name, load_pretrained(directory))):
        raise ConfigError(
            "tokenizer.path",
            directory and str(directory),
            f"transformers reads every tokenizer of {family.name} as that of its "
            "published models, so that the finished model would get other tokens; name the tokenizer of one of these",
        )
    if directory is None:
        check_vocabulary(config.tokenizer.train_vocab_size, config.model, "lower tokenizer.train_vocab_size")
        return
    field = start.setting if isinstance(start, LocalInit) and config.tokenizer.path is None else "tokenizer.path"
    tokenizer = load_pretrained(directory, field)
    model = start_directory(start) if isinstance(start, LocalInit) and not config.tokenizer.replace else None
    if isinstance(start, LocalInit) and model is not None and directory != model and tokenizer_files(model):
        own = load_pretrained(model, start.setting)
        if (found := difference(tokenizer, own)) is not None:
            raise ConfigError(
                "tokenizer.path",
                str(directory),
                f"is not the tokenizer of {start.setting} {str(model)!r} ({found}), whose embedding would "
                "be given wrong token ids; leave tokenizer.path out to use the model's own, or set tokenizer.replace "
                "to true",
            )
    _ensure_eos(tokenizer, directory)
    check_vocabulary(encoding_of(tokenizer).vocab_size, config.model, "set tokenizer.path to a tokenizer with fewer")


def _reads_as_of(family: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers reads a tokenizer as it is where a model of the family is next to it."""
    with tempfile.TemporaryDirectory() as scratch:
        save_tokenizer(tokenizer, Path(scratch))
        write_json(Path(scratch, "config.json"), {"model_type": family})
        return reads_as(Path(scratch), tokenizer)


def _ensure_eos(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if tokenizer.eos_token_id is not None:
        return
    known = tokenizer.get_vocab()
    named = next((token for token in _eos_of_model(tokenizer, directory) if token in known), None)
    tokenizer.add_special_tokens(
        {"eos_token": named or next((end for end in _COMMON_EOS if end in known), END_OF_TEXT)}
    )


def _eos_of_model(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[str]:
    path = directory / "config.json"
    ids = language_model(read_json(path)).get("eos_token_id") if path.is_file() else None
    return [tokenizer.convert_ids_to_tokens(i) for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
