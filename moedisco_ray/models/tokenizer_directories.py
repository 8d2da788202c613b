"""Tokenizer directories: load them with transformers, and copy them file by file.

This module imports transformers, which is slow. Workers that only encode text use `stages.text.tokenizer.Encoder`
instead.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moedisco_ray.core.config import tokenizer_files
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.core.store.read_roots import check_folder, check_inside, opened

_LOCAL = ("is_local", "local_files_only")
"""Settings that transformers saves with a tokenizer, although they only say how it was loaded on this machine."""
_SETTINGS = "tokenizer_config.json"
_ONLY_SAVED = frozenset({"name_or_path", "special_tokens_map_file", "tokenizer_file"})
"""Settings that transformers saves with a tokenizer and does not read."""
_PROBE_TEXTS = ("  The quick brown fox\n\tdef f(x):", "return x**2  # Größe, 漢字, 12345, it's")


def load_pretrained(directory: Path, field: str = "tokenizer.path") -> PreTrainedTokenizerBase:
    """Load a tokenizer with transformers, without network access and without running code from the directory.

    Args:
        directory: A model directory, or a directory with only a tokenizer's files.
        field: Setting that names the directory; errors name it.

    Raises:
        ConfigError: The tokenizer is missing, cannot be read, or has no fast version.
    """
    if not directory.is_dir():
        raise ConfigError(field, str(directory), "does not exist; name a directory with a tokenizer")
    names = {path.name for path in tokenizer_files(directory)}
    if not names:
        raise ConfigError(
            field,
            str(directory),
            "holds no tokenizer; name a directory with tokenizer.json, vocab.json and merges.txt, or a .model file",
        )
    try:
        check_folder(directory)  # because transformers opens the files itself, without the checks of `opened`
        _check_named_files(directory / _SETTINGS)
        if {"vocab.json", "merges.txt"} <= names and not {"tokenizer.json", _SETTINGS} & names:
            plain = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
            found = PreTrainedTokenizerFast(tokenizer_object=plain._tokenizer)  # noqa: SLF001  # has no public access
        else:
            found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception for a file that it cannot parse
        raise ConfigError(
            field, str(directory), f"holds no tokenizer that transformers can read ({_first_line(error)})"
        ) from error
    if not found.is_fast:
        raise ConfigError(
            field,
            str(directory),
            f"{type(found).__name__} has no fast version; convert it to tokenizer.json with transformers",
        )
    return found


def _check_named_files(settings: Path) -> None:
    """Refuse a tokenizer whose settings name a file that may not be read.

    The library transformers passes such names to the tokenizer's class.

    Raises:
        OSError: A file may not be read.
        ValueError: The settings are no JSON.
    """
    if not settings.is_file():
        return
    with opened(settings) as found:
        values = json.loads(found.read_text(encoding="utf-8"))
    for name, value in values.items():
        for text in value if isinstance(value, list) else [value]:
            # Most tokenizers name files of the machine that saved them; what does not exist here is not read.
            is_file = isinstance(text, str) and os.path.isfile(text)  # noqa: PTH113 - text may be no path
            if is_file and name not in _ONLY_SAVED:
                check_inside(Path(text))


def copy_tokenizer(source: Path, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Copy a tokenizer's files unchanged, chat template included.

    If no file names the tokenizer's class, transformers derives the class from the `config.json` next to the files, so
    the copy may give other tokens. In this case transformers writes the tokenizer again, with the name of its class.

    Args:
        source: Directory of the tokenizer.
        tokenizer: The tokenizer, loaded from `source`.
        directory: Target directory; it must exist.
    """
    for path in tokenizer_files(source):
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        with opened(path) as found:
            shutil.copyfile(found, target)
    if not reads_as(directory, tokenizer):
        save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer with transformers, under a class name that transformers 4 and other tools know."""
    tokenizer.save_pretrained(directory)
    path = directory / _SETTINGS
    settings = {name: value for name, value in read_json(path).items() if name not in _LOCAL}
    renamed = (
        {"tokenizer_class": "PreTrainedTokenizerFast"} if settings.get("tokenizer_class") == "TokenizersBackend" else {}
    )
    write_json(path, settings | renamed)


def reads_as(directory: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer in a directory gives a model the same tokens as a loaded one."""
    try:
        return difference(load_pretrained(directory), tokenizer) is None
    except ConfigError:
        return False


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first difference between two tokenizers that matters to a model, in words; None if there is none."""
    ids, others = one.get_vocab(), other.get_vocab()
    if ids != others:
        token = min(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
        return f"token {token!r} has id {ids.get(token)} there, but {others.get(token)} in the model's own"
    if [one(text)["input_ids"] for text in _PROBE_TEXTS] != [other(text)["input_ids"] for text in _PROBE_TEXTS]:
        return "the same text gives other tokens"
    if one.eos_token_id != other.eos_token_id:
        return f"documents end with {one.eos_token!r} there, but with {other.eos_token!r} in the model's own"
    return None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
