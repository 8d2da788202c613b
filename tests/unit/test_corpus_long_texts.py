"""Texts that are too long to hold in memory become the same documents as any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import Source
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages.corpus import cells, rows
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.long_json import read_member
from moedisco_ray.stages.corpus.readers import Slice, read_slice
from moedisco_ray.stages.corpus.sources import Input
from moedisco_ray.stages.corpus.streams import NotTextError
from moedisco_ray.stages.text.cutting import Limits, cut_document, cut_stream

characters = st.text(st.sampled_from('ab "\\/\n\t\u00e9\u3042\U0001f600\ud83d\ude00{}[],:0'), max_size=60)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | characters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(characters, inner, max_size=3),
    max_leaves=6,
)


def pieces_of(text, size):
    return [text[at : at + size] for at in range(0, len(text), size)]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(characters, values, max_size=4), characters, st.integers(1, 40), st.booleans())
def test_a_text_in_pieces_is_that_of_the_json_library(row, text, size, escaped):
    line = json.dumps({**row, "text": text, "after": 1}, ensure_ascii=escaped)
    expected = json.loads(line)["text"]
    assert "".join(read_member(pieces_of(line, size), "text", "it")) == expected


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(characters, values, max_size=4), st.integers(1, 40))
def test_without_the_text_the_members_are_named(row, size):
    row = {**row, "text": None}
    line = json.dumps(row)
    found = read_member(pieces_of(line, size), "text", "it")
    assert list(found) == list(json.loads(line))
    assert found["text"] == "n"


@pytest.mark.parametrize(
    "line", ["", "[1]", '{"text": "a', '{"text": "\\x"}', '{"a": [1, "text": "b"', '{"a" 1}', '{"text": "\\u12"}']
)
def test_what_is_not_json_is_named(line):
    with pytest.raises(NotTextError, match="it is not JSON"):
        "".join(read_member(pieces_of(line, 3), "text", "it"))


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("abc. \n\u3042"), max_size=300), st.integers(4, 60), st.integers(1, 50))
def test_a_stream_is_cut_like_the_whole_text(text, about, size):
    whole = list(cut_document(text, about)) if text and not text.isspace() else []
    assert list(cut_stream(pieces_of(text.encode(), size), about)) == whole


def documents(path, **source):
    settings = Source(path=str(path), **source)
    item = Input(0, "corpus.sources.0", "it", settings, Limits(16, 32))
    return [document for file in list_files(item.field, settings).files for document in read_slice(item, Slice(file))]


TEXTS = [
    "short",
    None,
    " \n ",
    "a sentence with \U0001f600 and \u3042. " * 400,
    "\n\nlines\n\nof text\n\n" * 300,
    "x" * 9000,
    "\u00e9" * 5000,
    '\\"\t' * 3000,
    "the end",
]


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "escaped.jsonl", "rows.parquet", "large.parquet", "coded.parquet", "saved.arrow"]
)
def test_long_texts_of_every_format_are_cut_like_short_ones(name, tmp_path, monkeypatch):
    path = tmp_path / name
    if name.endswith("jsonl"):
        lines = [json.dumps({"n": [1, {"text": "no"}], "text": text}, ensure_ascii=name[0] == "e") for text in TEXTS]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif name.endswith("parquet"):
        column = pa.array(TEXTS, pa.large_string() if name[0] == "l" else pa.string())
        pq.write_table(
            pa.table({"text": column.dictionary_encode() if name[0] == "c" else column}), path, row_group_size=4
        )
    else:
        table = pa.table({"text": TEXTS})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    expected = documents(path)
    assert len(expected) > 100
    monkeypatch.setattr(rows, "LONG", 1000)
    monkeypatch.setattr(cells, "LONG", 1000)
    monkeypatch.setattr(cells, "CHUNK", 777)
    monkeypatch.setattr("moedisco_ray.stages.corpus.streams.CHUNK", 501)
    assert documents(path) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({"body": "a" * 3000}), "has no such column; it has body"),
        (json.dumps({"text": ["a" * 3000]}), "the column holds list"),
        (json.dumps({"text": "a" * 3000})[:-2], "is not JSON"),
    ],
)
def test_what_a_long_line_lacks_is_named(line, message, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(line)
    monkeypatch.setattr(rows, "LONG", 1000)
    monkeypatch.setattr(cells, "LONG", 1000)
    monkeypatch.setattr("moedisco_ray.stages.corpus.streams.CHUNK", 501)
    with pytest.raises(CorpusError, match=message):
        documents(tmp_path / "rows.jsonl")


PEAK = """
import sys
from pathlib import Path
from moedisco_ray.core.config import Source
from moedisco_ray.stages.corpus import readers
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.reading import ReadUnit
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits
def stage(path):
    (item,) = expand_sources([Source(path=str(path))], path.parent, Limits(1024, 8192))
    for unit in readers.plan_units([(item, list_files(item.field, item.settings).files)]):
        for _ in ReadUnit(4)(unit, 1 << 20):
            pass
def peak():
    status = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) // 1024
path = Path(sys.argv[1])
stage(path.with_stem("short"))      # loads what libraries load at first use
before = peak()
stage(path)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize(("suffix", "most"), [("jsonl", 40), ("parquet", 150)])  # pyarrow holds a whole cell
def test_one_long_text_needs_little_memory(suffix, most, tmp_path):
    for stem, times in (("short", 100), ("long", 3 << 18)):  # 27 MB
        text = "some words of a line without an end " * times
        path = tmp_path / f"{stem}.{suffix}"
        if suffix == "jsonl":
            path.write_text(json.dumps({"text": text}))
        else:
            pq.write_table(pa.table({"text": [text]}), path)
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], check=True, capture_output=True, text=True, env=environment
    )
    assert int(done.stdout) < most
