"""Texts that a command reads: windows to compute routers from, and held-out documents to compare models on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.packed_tokens import TokenStream, write_packed
from moedisco_ray.stages.calibration_text import Batch, spread
from moedisco_ray.stages.corpus.unseen import read_spread
from moedisco_ray.stages.evaluate.measure import evaluate_start
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.unseen import Sample
from moedisco_ray.stages.text.validation import Documents

MOST_LENGTH = 1024
"""Maximum tokens of a window for calibration and measurement: enough context, and a short text still has several
windows."""
_HELD_OUT_EVERY = 5
"""Every fifth document of a text is held out, to compare the models on it."""
_DOCUMENT_WINDOWS = 8
"""Maximum length of a document, in windows."""


@dataclasses.dataclass(frozen=True)
class Text:
    """A text: the packed tokens that the router is computed from, and the documents that are held out.

    Attributes:
        packed: Directory of the packed tokens.
        held_out: The documents that are held out.
        share: Part of the text that both are together.
    """

    packed: Path
    held_out: Documents
    share: float


def read_texts(
    texts: Sequence[str], tokenizer: Path, encoder: Encoder, *, max_tokens: int, length: int, home: Path
) -> tuple[int, list[Text]]:
    """Read texts, an equal share of the tokens from each, in documents spread over the text.

    Args:
        texts: One source each.
        tokenizer: Directory of the tokenizer.
        encoder: The encoder of this tokenizer.
        max_tokens: Maximum number of tokens of all texts together.
        length: Maximum number of tokens of a window.
        home: Directory for the packed tokens.

    Returns:
        The length of a window, at most that of the shortest text, and the texts.

    Raises:
        CorpusError: A text cannot be read, or is too short.
    """
    found, shortest, limits = [], length, Limits(length, _DOCUMENT_WINDOWS * length)
    for number, text in enumerate(texts):
        try:
            samples, share = read_spread(text, encoder, max(1, max_tokens // len(texts)), limits, tokenizer=tokenizer)
        except CorpusError as error:
            raise CorpusError("--calibration", text, error.remedy) from error
        counted = [each for each in samples if _counts(each)]
        if len(counted) < 2:
            raise CorpusError(
                "--calibration",
                text,
                "gives fewer than two documents with tokens; name text with more, or raise --max-tokens",
            )
        documents = Documents(*map(tuple, zip(*counted, strict=True)))
        documents = dataclasses.replace(documents, sources=(f"{number:05d}",) * len(documents))
        held_N = np.arange(len(documents)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
        held_N[-1] |= not held_N.any()
        packed = home / f"text-{number}"
        index = write_packed(packed, [documents.where(~held_N).tokens], encoder.eos, encoder.vocab_size, encoder.bos)
        shortest = min(shortest, index["tokens"] - 1)
        found.append(Text(packed, documents.where(held_N), share))
    return shortest, found


def calibration_batches(texts: Sequence[Text], length: int, clusters: Sequence[int]) -> list[Batch]:
    """Calibration data: as many windows of each text as the shortest has, each with the cluster of its text."""
    streams = [TokenStream([text.packed], length) for text in texts]
    wanted = min(map(len, streams), default=0)
    return [
        batch for stream, cluster in zip(streams, clusters, strict=True) for batch in spread(stream, wanted, cluster)
    ]


def held_out_losses(start: Start, texts: Sequence[Text], encoder: Encoder, device: str) -> list[float]:
    """Loss of a model on the held-out documents of each text (nats per token)."""
    columns = [_held_out_column(texts, field.name) for field in dataclasses.fields(Documents)]
    measured = evaluate_start(
        start, Documents(*columns), prefix=encoder.prefix, sequence_length=start.sequence_length, device=device
    )
    return [source["loss"] for source in measured["sources"]]


def _held_out_column(texts: Sequence[Text], name: str) -> tuple[Any, ...]:
    return tuple(itertools.chain.from_iterable(getattr(text.held_out, name) for text in texts))


def _counts(document: Sample) -> bool:
    return len(document.tokens) > 0 if document.loss_mask is None else bool(document.loss_mask.any())
