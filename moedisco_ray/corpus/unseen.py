"""A bounded sample of text that is not the corpus': what a model is judged on that it was never trained on."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moedisco_ray.config import Source
from moedisco_ray.corpus.documents import document_id
from moedisco_ray.corpus.files import list_files
from moedisco_ray.corpus.readers import plan_units, read_unit
from moedisco_ray.corpus.sources import Input, expand_sources
from moedisco_ray.corpus.tokenizer import Encoder
from moedisco_ray.errors import CorpusError

Sample = tuple[bytes, str, str, NDArray[np.int32]]
"""Id, source, text and tokens of a document."""

_SETTING = "evaluation.sources"
_CHUNK = 64


def read_unseen(
    sources: Sequence[Source], encoder: Encoder, max_tokens: int, trained_on: Sequence[Path] = (),
) -> tuple[list[Sample], int]:
    """Read whole documents of each source, in the order of its files, while they fit its equal share of `max_tokens`.

    The first document of a source is always taken, however long it is. What comes first is no uniform sample, but nothing
    beyond it is read: a source may be of any size. A document that stands twice counts once, in the first source that has it.

    Args:
        sources: As configured in `evaluation.sources`.
        encoder: The model's tokeniser.
        max_tokens: Most tokens to read, of all sources together.
        trained_on: Parquet files of the training documents, with the column id; a document that is among them is left out.

    Returns:
        The documents, source by source; how many more were left out, since they were trained on.

    Raises:
        CorpusError: A source cannot be read, or has no document but those.
        ConfigError: Two sources have the same name.
    """
    with tempfile.TemporaryDirectory() as scratch:
        inputs = expand_sources(sources, Path(scratch), _SETTING, "unseen")
        share = max_tokens // len(inputs)
        found: dict[bytes, Sample] = {}
        for source in inputs:
            for name, text, tokens in _beginning(source, encoder, share):
                key = document_id(text)
                found.setdefault(key, (key, name, text, tokens))
    known = _among(list(found), trained_on)
    samples = [sample for key, sample in found.items() if key not in known]
    for source in inputs:
        if not any(name == source.name for _, name, _, _ in samples):
            raise CorpusError(f"{source.field}.path", source.path, "holds no text that was not trained on; name other text")
    return samples, len(known)


def _beginning(source: Input, encoder: Encoder, room: int) -> Iterator[tuple[str, str, NDArray[np.int32]]]:
    units = plan_units([(source, list_files(source.field, source.path, source.format))])
    texts = itertools.chain.from_iterable(map(read_unit, units))
    taken = 0
    while chunk := list(itertools.islice(texts, _CHUNK)):
        for text, tokens in zip(chunk, encoder.encode(chunk), strict=True):
            if taken and taken + len(tokens) > room:
                return
            taken += len(tokens)
            yield source.name, text, tokens


def _among(ids: Sequence[bytes], parts: Sequence[Path]) -> set[bytes]:
    """Which of some ids are in the files. They are few, the files' many: one pass over the files' ids."""
    wanted = pa.array(ids, pa.binary(len(ids[0]))) if ids else None
    known: set[bytes] = set()
    for part in parts if ids else ():
        for batch in pq.ParquetFile(part).iter_batches(columns=["id"]):
            column = batch.column(0)
            known.update(column.filter(pc.is_in(column, value_set=wanted)).to_pylist())
    return known
