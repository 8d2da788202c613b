"""The tokeniser: loaded from a directory or trained on the corpus, and saved so that `AutoTokenizer` loads it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers

from moedisco_ray.artifacts import write_json
from moedisco_ray.config import LocalInit, Model, RunConfig
from moedisco_ray.errors import CheckpointError, ConfigError

END_OF_TEXT = "<|endoftext|>"
_USUAL_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
_CHUNK_CHARACTERS = 1 << 20
_KEPT_SETTINGS = ("eos_token", "bos_token", "pad_token", "unk_token", "chat_template", "clean_up_tokenization_spaces")


class Encoder:
    """A saved tokeniser, to turn text into ids and back.

    Attributes:
        eos: Id of the end-of-sequence token.
        bos: Id of the beginning-of-sequence token.
        pad: Id of the padding token.
        vocab_size: One more than the largest id.

    Args:
        directory: As `save_tokenizer` wrote it.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = _shared_tokenizer((directory / "tokenizer.json").read_text(encoding="utf-8"))
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        ids = self._tokenizer.get_vocab()
        self.eos: int = ids[_content(settings["eos_token"])]
        self.bos: int = ids[_content(settings["bos_token"])]
        self.pad: int = ids[_content(settings["pad_token"])]
        self.vocab_size = _vocab_size(self._tokenizer)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, without special tokens."""
        ids: list[NDArray[np.int32]] = []
        for chunk in _chunks(texts):    # what the library returns takes some hundred bytes per token
            encoded = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
        return ids

    def decode(self, ids: Sequence[NDArray[np.int32]]) -> list[str]:
        """The text of each sequence of ids."""
        return self._tokenizer.decode_batch([sequence.tolist() for sequence in ids], skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE. Id 0 ends a text; the vocabulary is smaller where the text has too few pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2, show_progress=False))
    return tokenizer


def load_tokenizer(directory: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Read a tokeniser and its settings (special tokens by name).

    Args:
        directory: Holds `tokenizer.json`, or `vocab.json` and `merges.txt` of byte-level BPE; settings come from
            `tokenizer_config.json` where there is one.

    Raises:
        ConfigError: It holds neither, or they cannot be read.
    """
    whole, vocabulary, merges = directory / "tokenizer.json", directory / "vocab.json", directory / "merges.txt"
    try:
        if whole.exists():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocabulary.exists() and merges.exists():
            tokenizer = ByteLevelBPETokenizer(str(vocabulary), str(merges))._tokenizer  # noqa: SLF001  # the plain one inside
        else:
            raise FileNotFoundError("it holds no tokenizer.json, nor vocab.json with merges.txt")  # noqa: TRY301  # told below
        stored = directory / "tokenizer_config.json"
        settings = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        raise ConfigError("tokenizer.path", str(directory), f"is no tokeniser that can be read: {error}") from error
    return tokenizer, {name: settings[name] for name in _KEPT_SETTINGS if settings.get(name) is not None}


def save_tokenizer(tokenizer: Tokenizer, settings: dict[str, Any], directory: Path) -> None:
    """Write a directory that `AutoTokenizer` loads, with an end-of-sequence token in any case.

    Where the settings name none, it is the usual one that the vocabulary has, or else `<|endoftext|>` is added. It
    serves as beginning and padding too where those have no token.
    """
    named = {name: _content(value) if name.endswith("_token") else value for name, value in settings.items()}
    known = tokenizer.get_vocab()
    named.setdefault("eos_token", next((end for end in _USUAL_ENDS if end in known), END_OF_TEXT))
    named.setdefault("bos_token", named["eos_token"])
    named.setdefault("pad_token", named["eos_token"])
    tokenizer.add_special_tokens([named[name] for name in ("eos_token", "bos_token", "pad_token")])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    # By hand, for `save_pretrained` would import transformers and torch into every worker that reads text.
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def check_settings(config: RunConfig) -> None:
    """Find out before any text is read that the vocabulary will not fit the model.

    Raises:
        ConfigError: The tokeniser has, or is to be trained to, more entries than `model.config.vocab_size`, or cannot
            be read.
        CheckpointError: It has more than the checkpoint's embedding has rows.
    """
    if config.tokenizer.path is None:
        check_vocabulary(config.tokenizer.train_vocab_size, config.model, "lower tokenizer.train_vocab_size")
    else:
        tokenizer, settings = load_tokenizer(config.tokenizer.path)
        names_end = "eos_token" in settings or any(end in tokenizer.get_vocab() for end in _USUAL_ENDS)
        check_vocabulary(_vocab_size(tokenizer) + (not names_end), config.model, "choose another tokenizer.path")


def check_vocabulary(entries: int, model: Model, otherwise: str) -> None:
    """Refuse a tokeniser with more entries than the model's embedding has rows.

    Raises:
        ConfigError: `model.config.vocab_size` is too small.
        CheckpointError: The checkpoint's embedding is.
    """
    rows = model.architecture.vocab_size
    if rows is None or entries <= rows:
        return
    if isinstance(model.init, LocalInit):
        raise CheckpointError(
            model.init.setting, str(model.init.directory),
            f"its embedding has {rows} rows, the tokeniser {entries} entries; set tokenizer.path to its own")
    raise ConfigError(
        "model.config.vocab_size", rows, f"the tokeniser has {entries} entries; set at least {entries}, or {otherwise}")


# A tokeniser that is dropped leaves megabytes behind in its library (measured, tokenizers 0.23), so a worker that
# finishes bucket after bucket keeps one. Its contents are the key: the same path may hold another tokeniser next time.
@functools.lru_cache(maxsize=1)
def _shared_tokenizer(serialised: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialised)
    # A document that spells a special token means its characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _vocab_size(tokenizer: Tokenizer) -> int:
    # Ids may have gaps: the embedding needs a row for the largest.
    return max(tokenizer.get_vocab().values()) + 1


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _chunks(texts: Sequence[str]) -> Iterable[Sequence[str]]:
    start = held = 0
    for i, text in enumerate(texts):
        held += len(text)
        if held >= _CHUNK_CHARACTERS:
            yield texts[start:i + 1]
            start, held = i + 1, 0
    if start < len(texts):
        yield texts[start:]
