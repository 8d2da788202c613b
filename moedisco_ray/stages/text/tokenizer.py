"""A tokenizer as workers use it, without transformers; and the byte-level BPE that a run trains when it starts from nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moedisco_ray.core.artifacts import read_json, write_json
from moedisco_ray.core.config import LocalInit, Model
from moedisco_ray.core.errors import CheckpointError, ConfigError

ENCODING = "encoding.json"
"""File next to a prepared tokenizer's own files, with what `Encoder` needs."""
END_OF_TEXT = "<|endoftext|>"
_CHUNK_CHARACTERS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How text becomes token ids.

    Attributes:
        serialised: The tokenizer, as the tokenizers library writes it.
        eos: Id of the end-of-sequence token, which training puts after each document.
        bos: Id of the beginning-of-sequence token that the tokenizer puts before each text; None where it puts none.
        vocab_size: One more than the largest id.
    """

    serialised: str
    eos: int
    bos: int | None
    vocab_size: int


class Encoder:
    """Turns text into token ids and back.

    Attributes:
        eos: As `Encoding.eos`.
        bos: As `Encoding.bos`.
        vocab_size: As `Encoding.vocab_size`.

    Args:
        source: A prepared tokenizer directory, such as a corpus artifact's, or its encoding.
    """

    def __init__(self, source: Path | Encoding) -> None:
        encoding = Encoding(**read_json(source / ENCODING)) if isinstance(source, Path) else source
        self._tokenizer = _shared_tokenizer(encoding.serialised)
        self.eos = encoding.eos
        self.bos = encoding.bos
        self.vocab_size = encoding.vocab_size

    @property
    def prefix(self) -> int:
        """The token that a document's first token is predicted from: BOS where the tokenizer adds it, else EOS."""
        return self.eos if self.bos is None else self.bos

    @property
    def added(self) -> int:
        """Special tokens that training puts before and after each document: EOS, and BOS where the tokenizer adds it."""
        return 1 + (self.bos is not None)

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


def save_trained(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a trained tokenizer so that `AutoTokenizer` and `Encoder` read it; `<|endoftext|>` ends, begins and pads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(directory / "tokenizer.json"))
    # By hand, for `save_pretrained` would import transformers and torch into every worker that reads text.
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), END_OF_TEXT)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    ids = tokenizer.get_vocab()
    write_encoding(Encoding(tokenizer.to_str(), ids[END_OF_TEXT], None, vocabulary_size(ids)), directory)


def write_encoding(encoding: Encoding, directory: Path) -> None:
    """Make a directory one that `Encoder` reads."""
    write_json(directory / ENCODING, dataclasses.asdict(encoding))


def vocabulary_size(ids: dict[str, int]) -> int:
    """Rows that an embedding needs; ids may have gaps, so it is one more than the largest."""
    return max(ids.values()) + 1


def check_vocabulary(entries: int, model: Model, otherwise: str) -> None:
    """Refuse a tokenizer with more entries than the model's embedding has rows.

    Raises:
        ConfigError: `model.config.vocab_size` is too small.
        CheckpointError: The embedding of the model to start from is too small.
    """
    rows = model.architecture.vocab_size
    if rows is None or entries <= rows:
        return
    if isinstance(model.init, LocalInit):
        raise CheckpointError(
            model.init.setting, str(model.init.directory),
            f"its embedding has {rows} rows, but the tokenizer has {entries} entries; {otherwise}")
    raise ConfigError(
        "model.config.vocab_size", rows, f"the tokenizer has {entries} entries; set at least {entries}, or {otherwise}")


# A tokenizer that is dropped leaves megabytes behind in its library (measured, tokenizers 0.23), so a worker that
# finishes bucket after bucket keeps one. Its contents are the key: the same path may hold another tokenizer next time.
@functools.lru_cache(maxsize=1)
def _shared_tokenizer(serialised: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialised)
    # A document that spells a special token means its characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _chunks(texts: Sequence[str]) -> Iterable[Sequence[str]]:
    start = held = 0
    for i, text in enumerate(texts):
        held += len(text)
        if held >= _CHUNK_CHARACTERS:
            yield texts[start:i + 1]
            start, held = i + 1, 0
    if start < len(texts):
        yield texts[start:]
