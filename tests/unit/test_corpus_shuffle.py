"""The shuffle through files: every row arrives in its bucket, in a number of reads that grows with the rows alone."""

from __future__ import annotations

import functools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.stages.corpus import shuffle as module
from moedisco_ray.stages.corpus.shuffle import Digits, Scattered, in_this_process, read_pieces, scatter, shuffle

SCHEMA = pa.schema([("bucket", pa.int64()), ("text", pa.large_string())])


def bucket(table):
    return table["bucket"].to_numpy()


def table_of(rows):
    return pa.table(
        [pa.array([row[0] for row in rows], pa.int64()), pa.array([row[1] for row in rows], pa.large_string())], SCHEMA
    )


def shuffled(directory, tasks, buckets, map_tasks=in_this_process, file_bytes=100):
    digits = Digits.of(buckets)
    written = [
        Scattered(
            i,
            scatter(map(table_of, tables), directory / "first" / f"{i}", SCHEMA, bucket, digits, file_bytes=file_bytes),
        )
        for i, tables in enumerate(tasks)
    ]
    return shuffle(written, directory, SCHEMA, bucket, digits, map_tasks)


@given(buckets=st.integers(1, 70), fan_out=st.integers(2, 6), backwards=st.booleans(), data=st.data())
@settings(deadline=None)
def test_every_row_arrives_in_its_bucket(tmp_path_factory, buckets, fan_out, backwards, data):
    rows = st.lists(st.tuples(st.integers(0, buckets - 1), st.text(max_size=20)), max_size=15)
    tasks = data.draw(st.lists(st.lists(rows, max_size=3), max_size=6))
    order = (lambda function, items: map(function, items[::-1])) if backwards else in_this_process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FAN_OUT", fan_out)
        pieces = shuffled(tmp_path_factory.mktemp("shuffle"), tasks, buckets, order)
    expected = [(i, text) for tables in tasks for table in tables for i, text in table]
    assert [piece.index for piece in pieces] == list(range(buckets))
    for piece in pieces:
        found = read_pieces(piece, SCHEMA)
        assert found.schema == SCHEMA
        assert set(bucket(found)) <= {piece.index}
        assert sorted(found["text"].to_pylist()) == sorted(text for i, text in expected if i == piece.index)
        assert read_pieces(piece, SCHEMA, ["text"])["text"] == found["text"]


def test_reads_grow_with_the_rows_and_the_driver_holds_one_name_per_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FAN_OUT", 8)
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    counts = {}
    for buckets in (16, 32, 64):
        reads = []
        rows = [(i, f"{i}") for i in range(buckets)]

        def counting(function, items, reads=reads):
            reads += [len(pieces.files) for _, pieces in items]
            return map(function, items)

        # As many tasks as buckets, each with rows of all buckets, as in a corpus.
        pieces = shuffled(tmp_path / str(buckets), [[rows]] * buckets, buckets, counting)
        assert all(len(read_pieces(piece, SCHEMA)) == buckets for piece in pieces)
        assert len({id(piece.files) for piece in pieces}) <= 8
        counts[buckets] = sum(reads) + sum(len(piece.files) for piece in pieces)
    # Each pass reads every file once per digit: buckets x base, twice.
    assert counts == {16: 16 * 4 * 2, 32: 32 * 6 + 32 * 6, 64: 64 * 8 * 2}


def test_a_pass_deletes_the_files_before_it_and_repeats_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FAN_OUT", 2)
    generator = np.random.default_rng(0)
    tasks = [[[(int(i), "x" * int(i)) for i in generator.integers(0, 8, 20)]] for _ in range(4)]

    def twice(function, items):
        first = {report.index: [path.read_bytes() for path in report.files] for report in map(function, items)}
        again = list(map(function, items))
        assert first == {report.index: [path.read_bytes() for path in report.files] for report in again}
        return again

    pieces = shuffled(tmp_path, tasks, 8, twice)
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {path for piece in pieces for path in piece.files}
    assert functools.reduce(max, (len(piece.files) for piece in pieces)) <= 2
