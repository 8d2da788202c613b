"""Tokenizers that were not trained here: read by transformers, copied file by file, checked against the model.

Slow to import, since transformers is; workers that read text use `Encoder` alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moedisco_ray.artifacts import read_json, write_json
from moedisco_ray.config import LocalInit, RunConfig, tokenizer_directory, tokenizer_files
from moedisco_ray.corpus.tokenizer import (
    ENCODING,
    END_OF_TEXT,
    Encoder,
    Encoding,
    check_vocabulary,
    vocabulary_size,
    write_encoding,
)
from moedisco_ray.errors import ConfigError
from moedisco_ray.read_roots import check_folder, opened

PROBES = ("  The quick brown fox\n\tdef f(x):", "return x**2  # Größe, 漢字, 12345, it's")
"""Texts on which two tokenizers are compared."""
_USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")


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


def prepare_tokenizer(source: Path, directory: Path, field: str = "tokenizer.path") -> None:
    """Copy a tokenizer's files as they are, chat template included, and write the encoding that workers use.

    Where the tokenizer has no end-of-sequence token, the usual one of its vocabulary serves, or `<|endoftext|>` is added. Its files
    are then written anew; so they are where their class follows from the model they came with.

    Args:
        source: A directory that `load_pretrained` reads.
        directory: Where the files go; made when absent.
        field: The setting that names the source; errors name it.

    Raises:
        ConfigError: As `load_pretrained`.
    """
    tokenizer = load_pretrained(source, field)
    as_it_is = tokenizer.eos_token_id is not None
    _give_end(tokenizer, source)
    directory.mkdir(parents=True, exist_ok=True)
    if as_it_is:
        for path in tokenizer_files(source):
            target = directory / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            with opened(path) as found:
                shutil.copyfile(found, target)
    if not as_it_is or not _reads_the_same(directory, tokenizer):
        tokenizer.save_pretrained(directory)
        name_class(directory)
    write_encoding(encoding_of(tokenizer), directory)


def name_class(directory: Path) -> None:
    """Name the class of a tokenizer that transformers 5 saved as transformers 4 and its readers know it."""
    path = directory / "tokenizer_config.json"
    settings = read_json(path)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def encoding_of(tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """The encoding of a loaded tokenizer, with BOS if and only if the tokenizer puts it before a text."""
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    bos = tokenizer.bos_token_id
    first, bare = (tokenizer("a", add_special_tokens=special)["input_ids"][:1] for special in (True, False))
    adds_bos = bos is not None and first == [bos] != bare
    return Encoding(plain.to_str(), int(tokenizer.eos_token_id), bos if adds_bos else None, vocabulary_size(tokenizer.get_vocab()))


def open_encoder(directory: Path, field: str = "tokenizer.path") -> Encoder:
    """The encoder of a prepared tokenizer directory, or of any model directory.

    Raises:
        ConfigError: As `load_pretrained`.
    """
    if (directory / ENCODING).is_file():
        return Encoder(directory)
    tokenizer = load_pretrained(directory, field)
    _give_end(tokenizer, directory)
    return Encoder(encoding_of(tokenizer))


def check_tokenizer(config: RunConfig) -> None:
    """Find out before any text is read that a run's tokenizer is the wrong one for its model, or does not fit it.

    Raises:
        ConfigError: The tokenizer cannot be read, or differs from the one of the model to start from and `tokenizer.replace` is not
            set; or the model to start from has none; or `model.config.vocab_size` is too small for it.
        CheckpointError: The embedding of the model to start from is too small for it.
    """
    directory, start = tokenizer_directory(config), config.model.init
    if directory is None:
        check_vocabulary(config.tokenizer.train_vocab_size, config.model, "lower tokenizer.train_vocab_size")
        return
    field = start.setting if isinstance(start, LocalInit) and config.tokenizer.path is None else "tokenizer.path"
    tokenizer = load_pretrained(directory, field)
    keeps = isinstance(start, LocalInit) and not config.tokenizer.replace
    if isinstance(start, LocalInit) and keeps and directory != start.directory and tokenizer_files(start.directory):
        own = load_pretrained(start.directory, start.setting)
        if (difference := _difference(tokenizer, own)) is not None:
            raise ConfigError(
                "tokenizer.path", str(directory),
                f"is not the tokenizer of {start.setting} {str(start.directory)!r} ({difference}), whose embedding would be given "
                "wrong token ids; leave tokenizer.path out to use the model's own, or set tokenizer.replace to true")
    _give_end(tokenizer, directory)
    check_vocabulary(encoding_of(tokenizer).vocab_size, config.model, "set tokenizer.path to a tokenizer with fewer")


def _give_end(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if tokenizer.eos_token_id is not None:
        return
    known = tokenizer.get_vocab()
    named = next((token for token in _ends_of_model(tokenizer, directory) if token in known), None)
    tokenizer.add_special_tokens({"eos_token": named or next((end for end in _USUAL_ENDS if end in known), END_OF_TEXT)})


def _ends_of_model(tokenizer: PreTrainedTokenizerBase, directory: Path) -> list[str]:
    path = directory / "config.json"
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return [tokenizer.convert_ids_to_tokens(i) for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]


def _reads_the_same(directory: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return _difference(load_pretrained(directory), tokenizer) is None
    except ConfigError:
        return False


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first thing in which two tokenizers differ that a model was trained on; None: they are the same to it."""
    ids, others = one.get_vocab(), other.get_vocab()
    if ids != others:
        token = min(token for token in ids.keys() | others.keys() if ids.get(token) != others.get(token))
        return f"token {token!r} has id {ids.get(token)} there, and {others.get(token)} in the model's own"
    if [one(text)["input_ids"] for text in PROBES] != [other(text)["input_ids"] for text in PROBES]:
        return "the same text becomes other tokens"
    if one.eos_token_id != other.eos_token_id:
        return f"documents end with {one.eos_token!r} there, and with {other.eos_token!r} in the model's own"
    return None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
