"""Encode text without transformers, and train the byte-level BPE of a run that has no tokenizer yet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moedisco_ray.core.config import LocalInit, Model
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.store.artifacts import read_json, write_json

ENCODING = "encoding.json"
"""Name of the file with an `Encoding`, next to a prepared tokenizer's own files."""
END_OF_TEXT = "<|endoftext|>"
_CHUNK_CHARACTERS = 1 << 17
"""Characters to encode at once; limited, because the library's results take hundreds of bytes per token."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A tokenizer's encoding of text as token ids.

    Attributes:
        serialised: The tokenizer in the JSON format of the tokenizers library.
        eos: Id of the end-of-sequence token, which training adds after each document.
        bos: Id of the beginning-of-sequence token, if the tokenizer adds it before each text; else None.
        vocab_size: Largest id plus one.
    """

    serialised: str
    eos: int
    bos: int | None
    vocab_size: int


class Encoder:
    """Turns text into token ids and back.

    Attributes:
        eos: Id of the end-of-sequence token; see `Encoding.eos`.
        bos: Id of the beginning-of-sequence token, or None; see `Encoding.bos`.
        vocab_size: Largest id plus one.

    Args:
        source: A prepared tokenizer directory, such as a corpus artifact's, or an encoding.
    """

    def __init__(self, source: Path | Encoding) -> None:
        encoding = Encoding(**read_json(source / ENCODING)) if isinstance(source, Path) else source
        self._tokenizer = _shared_tokenizer(encoding.serialised)
        self.eos = encoding.eos
        self.bos = encoding.bos
        self.vocab_size = encoding.vocab_size

    @property
    def prefix(self) -> int:
        """Token from which a document's first token is predicted: BOS if the tokenizer adds it, else EOS."""
        return self.eos if self.bos is None else self.bos

    @property
    def added(self) -> int:
        """Number of special tokens that training adds to each document: EOS, and BOS if the tokenizer adds it."""
        return 1 + (self.bos is not None)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Token ids of each text, without special tokens."""
        ids: list[NDArray[np.int32]] = []
        for chunk in _chunks(texts):
            encoded = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]
        return ids

    def decode(self, ids: Sequence[NDArray[np.int32]]) -> list[str]:
        """Text of each sequence of token ids."""
        return self._tokenizer.decode_batch([sequence.tolist() for sequence in ids], skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with id 0 as end of text. The vocabulary is smaller if the text has too few pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        ),
    )
    return tokenizer


def save_trained(tokenizer: Tokenizer, directory: Path) -> None:
    """Write a trained tokenizer for `AutoTokenizer` and `Encoder`; EOS, BOS and padding are `<|endoftext|>`."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(directory / "tokenizer.json"))
    # Write the files directly: `save_pretrained` would import transformers and torch into every worker that reads text.
    special = dict.fromkeys(("eos_token", "bos_token", "pad_token"), END_OF_TEXT)
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    ids = tokenizer.get_vocab()
    write_encoding(Encoding(tokenizer.to_str(), ids[END_OF_TEXT], None, vocabulary_size(ids)), directory)


def write_encoding(encoding: Encoding, directory: Path) -> None:
    """Write an encoding into a tokenizer directory, for `Encoder`."""
    write_json(directory / ENCODING, dataclasses.asdict(encoding))


def vocabulary_size(ids: dict[str, int]) -> int:
    """Number of embedding rows that a vocabulary needs: the largest id plus one, since ids may have gaps."""
    return max(ids.values()) + 1


def check_vocabulary(entries: int, model: Model, otherwise: str) -> None:
    """Check that the model's embedding has a row for every entry of the tokenizer.

    Args:
        entries: Number of entries of the tokenizer.
        model: The model section of the configuration.
        otherwise: A second remedy, with which the error message ends, such as "set ... to a smaller tokenizer".

    Raises:
        ConfigError: `model.config.vocab_size` is too small.
        CheckpointError: The embedding of the model to start from is too small.
    """
    rows = model.architecture.vocab_size
    if rows is None or entries <= rows:
        return
    if isinstance(model.init, LocalInit):
        raise CheckpointError(
            model.init.setting,
            str(start_directory(model.init)),
            f"its embedding has {rows} rows, but the tokenizer has {entries} entries; {otherwise}",
        )
    raise ConfigError(
        "model.config.vocab_size", rows, f"the tokenizer has {entries} entries; set at least {entries}, or {otherwise}"
    )


# Each tokenizer object leaks megabytes in the library when it is freed (measured, tokenizers 0.23), so a worker keeps
# one for all its buckets. The cache's key is the tokenizer's contents, since another tokenizer may later be stored at
# the same path.
@functools.lru_cache(maxsize=1)
def _shared_tokenizer(serialised: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(serialised)
    # A special token spelled out in a document is encoded as ordinary characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _chunks(texts: Sequence[str]) -> Iterable[Sequence[str]]:
    start = held = 0
    for i, text in enumerate(texts):
        held += len(text)
        if held >= _CHUNK_CHARACTERS:
            yield texts[start : i + 1]
            start, held = i + 1, 0
    if start < len(texts):
        yield texts[start:]
