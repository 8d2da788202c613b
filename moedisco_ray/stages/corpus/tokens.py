"""Tokenize documents, and cut running text with too many tokens: pure functions on tables of documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moedisco_ray.stages.corpus.documents import DOCUMENTS, following_ids, id_column, id_matrix
from moedisco_ray.stages.corpus.rules import Rules
from moedisco_ray.stages.text.cutting import Cutter
from moedisco_ray.stages.text.tokenizer import Encoder

Tokens = NDArray[np.int32]


def tokenize(documents: pa.Table, encoder: Encoder, rules: Rules) -> pa.Table:
    """Tokenize documents that `rules.split` has decided on; return them in order, with the schema `DOCUMENTS`."""
    table, tokens = _cut_by_tokens(documents, encoder, rules.document_tokens)
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([np.empty(0, dtype=np.int32), *tokens])
    return pa.table(
        [
            table["id"],
            pa.array(rules.names).take(table["order"].combine_chunks()),
            table["text"].cast(pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)),
            pa.array(lengths + encoder.added - table["loss_mask"].is_valid().to_numpy(), pa.int32()),
            table["copies"],
            table["group"],
            table["held_out"],
            table["loss_mask"],
        ],
        schema=DOCUMENTS,
    )


def figures(documents: pa.Table, rules: Rules) -> NDArray[np.int64]:
    """Documents, packed tokens (with copies and special tokens), and bytes of text of each of S inputs, [S, 3].

    Args:
        documents: Documents with the schema `DOCUMENTS`.
        rules: The settings.
    """
    order = pc.index_in(documents["source"], value_set=pa.array(rules.names)).to_numpy()
    tokens = documents["packed"].to_numpy().astype(np.int64) * documents["copies"].to_numpy()
    counted = [np.ones(len(order)), tokens, pc.binary_length(documents["text"]).to_numpy()]
    return np.stack([np.bincount(order, values, minlength=len(rules.names)) for values in counted], axis=1).astype(
        np.int64
    )


def cut_to_limit(text: str, tokens: Tokens, encoder: Encoder, limit: int) -> list[tuple[str, Tokens]]:
    """Cut a document into parts of at most `limit` tokens (16 or more) and return each part with its tokens."""
    if len(tokens) <= limit:
        return [(text, tokens)]
    data = text.encode()
    cutter = Cutter(max(4, len(data) * limit // len(tokens) * 2 // 3))
    pieces = [piece.decode() for piece in (*cutter.feed(data), *cutter.finish())]
    texts = [piece.strip("\n") for piece in pieces if not piece.isspace()]
    return [
        part
        for text, tokens in zip(texts, encoder.encode(texts), strict=True)
        for part in cut_to_limit(text, tokens, encoder, limit)
    ]


def _cut_by_tokens(table: pa.Table, encoder: Encoder, limit: int) -> tuple[pa.Table, list[Tokens]]:
    texts = table["text"].to_pylist()
    tokens = _encoded(texts, table["tokens"], encoder)
    whole = table["loss_mask"].is_valid().to_pylist()
    if all(len(ids) <= limit or is_whole for ids, is_whole in zip(tokens, whole, strict=True)):
        return table, tokens
    parts = [
        [(text, ids)] if is_whole else cut_to_limit(text, ids, encoder, limit)
        for text, ids, is_whole in zip(texts, tokens, whole, strict=True)
    ]
    counts = [len(each) for each in parts]
    rows = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    cut = table.take(pa.array(rows))
    ids = id_column(following_ids(id_matrix(cut), numbers).tobytes())
    short = pa.array([text for each in parts for text, _ in each], pa.large_string())
    for name, column in (("id", ids), ("text", short)):
        cut = cut.set_column(cut.schema.get_field_index(name), name, column)
    return cut, [tokens for each in parts for _, tokens in each]


def _encoded(texts: Sequence[str], given: pa.ChunkedArray, encoder: Encoder) -> list[Tokens]:
    """Tokens of each text: the given ones, and where they are null, its encoding."""
    if given.null_count == len(given):
        return encoder.encode(texts)
    encoded = iter(encoder.encode([text for text, ids in zip(texts, given, strict=True) if not ids.is_valid]))
    return [ids.values.to_numpy() if ids.is_valid else next(encoded) for ids in given]
