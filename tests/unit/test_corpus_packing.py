from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.packed_tokens import write_index
from moedisco_ray.stages.corpus.documents import DOCUMENTS, document_id
from moedisco_ray.stages.text.packing import pack_part, part_path

EOS = 0
ENCODER = SimpleNamespace(eos=EOS, bos=None, vocab_size=10)
document = st.tuples(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 4))  # tokens, copies
parts = st.lists(st.lists(document, max_size=6), max_size=3)


def write(directory, found):
    paths = []
    for i, rows in enumerate(found):
        names = [f"{i} {j}" for j in range(len(rows))]
        table = pa.Table.from_pylist(
            [
                {
                    "id": document_id(name),
                    "source": "s",
                    "text": name,
                    "tokens": tokens,
                    "packed": len(tokens) + 1,
                    "copies": copies,
                    "group": document_id(name),
                    "held_out": False,
                }
                for name, (tokens, copies) in zip(names, rows, strict=True)
            ],
            schema=DOCUMENTS,
        )
        paths.append(part_path(directory, i))
        pq.write_table(table, paths[-1], row_group_size=2)
    return paths


def pack(found, directory, keeps=None):
    """Pack the parts one by one, the last first, and make them one stream."""
    directory.mkdir()
    tables = [pq.read_table(path) for path in write(directory, found)]
    masks = keeps or [None] * len(tables)
    pieces = [pack_part(tables[i], i, directory, ENCODER, masks[i], length=8) for i in reversed(range(len(tables)))]
    return write_index(directory, itertools.chain(*pieces), ENCODER.vocab_size)


def packed(directory, index):
    pieces = [np.load(directory / name) for name in index["parts"]]
    return np.concatenate([np.empty(0, dtype=np.uint16), *pieces]).tolist()


@settings(max_examples=60, deadline=None)
@given(parts)
def test_each_document_is_packed_as_often_as_it_has_copies_pass_after_pass(found):
    with tempfile.TemporaryDirectory() as scratch:
        index = pack(found, Path(scratch) / "shards")
        stream = packed(Path(scratch) / "shards", index)
    flat = [row for rows in found for row in rows]
    expected = [tokens for c in range(4) for tokens, copies in flat if copies > c]
    assert stream == [token for tokens in expected for token in [*tokens, EOS]]
    assert index["documents"] == len(expected) == sum(copies for _, copies in flat)
    assert index["tokens"] == len(stream)


@settings(max_examples=examples(20, 60), deadline=None)
@given(parts, st.integers(1, 3), st.integers(0, 99))
def test_packing_by_cluster_is_a_partition_of_packing_all(found, clusters, seed):
    generator = np.random.Generator(np.random.Philox(key=[seed, 0]))
    members = [generator.integers(clusters, size=len(rows)) for rows in found]
    with tempfile.TemporaryDirectory() as scratch:
        whole = pack(found, Path(scratch) / "all")
        indices = []
        for k in range(clusters):
            index = pack(found, Path(scratch) / str(k), [own == k for own in members])
            indices.append(index)
            flat = [row for rows in found for row in rows]
            mine = [row for row, member in zip(flat, itertools.chain(*members), strict=True) if member == k]
            expected = [tokens for c in range(4) for tokens, copies in mine if copies > c]
            assert packed(Path(scratch) / str(k), index) == [token for tokens in expected for token in [*tokens, EOS]]
    for figure in ("documents", "tokens"):
        assert sum(index[figure] for index in indices) == whole[figure]
