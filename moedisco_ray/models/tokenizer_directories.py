"""Tokenizers in directories: read by transformers, whatever their files are, and copied file by file.

Slow to import, since transformers is; workers that read text use `corpus.Encoder` alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.config import tokenizer_files
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.read_roots import check_folder, opened

_PROBES = ("  The quick brown fox\n\tdef f(x):", "return x**2  # Größe, 漢字, 12345, it's")


def load_pretrained(directory: Path, field: str = "tokenizer.path") -> PreTrainedTokenizerBase:
    """Load a tokenizer of any kind that transformers can read; nothing is fetched and no code of the directory is run.

    Args:
        directory: A model directory, or one with a tokenizer's files alone.
        field: The setting that names it; errors name it.

    Raises:
        ConfigError: There is none, it cannot be read, or it has no form that the tokenizers library runs.
    """
    if not directory.is_dir():
        raise ConfigError(field, str(directory), "no such directory; name one with a tokenizer")
    names = {path.name for path in tokenizer_files(directory)}
    if not names:
        raise ConfigError(
            field, str(directory),
            "holds no tokenizer; name a directory with tokenizer.json, vocab.json and merges.txt, or a .model file")
    try:
        check_folder(directory)     # transformers opens the files itself
        if {"vocab.json", "merges.txt"} <= names and not {"tokenizer.json", "tokenizer_config.json"} & names:
            plain = ByteLevelBPETokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"))
            found = PreTrainedTokenizerFast(tokenizer_object=plain._tokenizer)  # noqa: SLF001  # the plain one inside
        else:
            found = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise ConfigError(field, str(directory), f"holds no tokenizer that transformers can read ({_first_line(error)})") from error
    if not found.is_fast:
        raise ConfigError(
            field, str(directory), f"{type(found).__name__} has no fast form; convert it to tokenizer.json with transformers first")
    return found


def copy_tokenizer(source: Path, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Copy a tokenizer's files as they are, chat template included.

    Where no file names the tokenizer's class, it follows from the `config.json` next to it. If the copy gives other tokens for that
    reason, transformers writes it anew, with its class.

    Args:
        source: The directory of the tokenizer.
        tokenizer: As it was loaded from there.
        directory: Where to; it exists.
    """
    for path in tokenizer_files(source):
        target = directory / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        with opened(path) as found:
            shutil.copyfile(found, target)
    if not reads_as(directory, tokenizer):
        save_tokenizer(tokenizer, directory)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer by transformers, with the class name that transformers 4 and its readers know it by."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def reads_as(directory: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer in a directory is the same to a model as a loaded one."""
    try:
        return difference(load_pretrained(directory), tokenizer) is None
    except ConfigError:
        return False


def difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first thing in which two tokenizers differ that a model was trained on; None: they are the same to it."""
    ids, others = one.get_vocab(), other.get_vocab()
    if ids != others:
        token = min(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
        return f"token {token!r} has id {ids.get(token)} there, and {others.get(token)} in the model's own"
    if [one(text)["input_ids"] for text in _PROBES] != [other(text)["input_ids"] for text in _PROBES]:
        return "the same text becomes other tokens"
    if one.eos_token_id != other.eos_token_id:
        return f"documents end with {one.eos_token!r} there, and with {other.eos_token!r} in the model's own"
    return None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
