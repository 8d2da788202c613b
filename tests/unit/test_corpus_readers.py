from __future__ import annotations

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import Source
from moedisco_ray.core.errors import ConfigError, CorpusError
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units, read_unit
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits

words = st.text(st.characters(codec="utf-8", categories=["L", "N"]), max_size=12)


LIMITS = Limits(1024, 8192)


def planned(tmp_path, unit_bytes=1 << 20, limits=LIMITS, **source):
    (item,) = expand_sources([Source(**source)], tmp_path / "scratch", limits)
    return plan_units([(item, list_files(item.field, item.settings).files)], unit_bytes)


def read(tmp_path, unit_bytes=1 << 20, **source):
    return [document.text for unit in planned(tmp_path, unit_bytes, **source) for document in read_unit(unit, [])]


def test_text_as_files_paragraphs_and_lines(tmp_path):
    (tmp_path / "b.txt").write_text("one\ntwo\n\n \nthree\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_bytes(b"\xef\xbb\xbffour\r\nfive")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").touch()
    path = str(tmp_path)
    assert read(tmp_path, path=path) == ["one\ntwo\n\n \nthree", "four\nfive"]
    assert read(tmp_path, path=path, documents="file") == ["one\ntwo\n\n \nthree", "four\nfive"]
    assert read(tmp_path, path=path, documents="paragraph") == ["one\ntwo", "three", "four\nfive"]
    assert read(tmp_path, path=path, documents="line") == ["one", "two", "three", "four", "five"]


def test_globs_uris_and_compression(tmp_path):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "x1.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n\n{"text": null}\n{"text": " "}\n'))
    (folder / "x2.jsonl").write_text('{"text": "plain \\ud800"}')
    (tmp_path / "a" / "x3.txt").write_text("text")
    assert read(tmp_path, path=str(tmp_path / "**" / "x[12].jsonl*")) == ["zipped", "plain \ufffd"]
    assert read(tmp_path, path=str(tmp_path / "a" / "*.txt")) == ["text"]
    assert read(tmp_path, path=f"file://{tmp_path}/a/*") == ["text"]
    assert read(tmp_path, path=f"file://{tmp_path}/a/**/*.jsonl") == ["plain \ufffd"]
    assert read(tmp_path, path=f"file://{folder}") == ["zipped", "plain \ufffd"]
    assert read(tmp_path, path=str(tmp_path / "?" / "x?.txt")) == ["text"]


def test_structured_files_are_not_mixed_with_the_readme_beside_them(tmp_path):
    (tmp_path / "README.md").write_text("about")
    pq.write_table(pa.table({"body": ["first", None, "second"]}), tmp_path / "p.parquet", row_group_size=1)
    assert read(tmp_path, path=str(tmp_path), text_column="body") == ["first", "second"]
    assert read(tmp_path, path=str(tmp_path / "README.md")) == ["about"]


def test_parquet_by_row_groups_and_any_string_type(tmp_path):
    values = [f"text {i}" for i in range(40)]
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"t": pa.array(values).cast(kind)}), tmp_path / "p.parquet", row_group_size=3)
        assert read(tmp_path, 500, path=str(tmp_path / "p.parquet"), text_column="t") == values


@pytest.mark.ecosystem("Text: Hugging Face datasets, and functions that change rows", "datasets")
def test_saved_data_sets_as_the_library_reads_them(tmp_path):
    train = datasets.Dataset.from_dict({"body": ["a", "b", "c", "d"], "n": [1, 2, 3, 4]})
    train.save_to_disk(str(tmp_path / "one"), num_shards=2)
    train.select([3, 1]).save_to_disk(str(tmp_path / "chosen"))
    datasets.DatasetDict({"train": train, "test": train.select([0])}).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"a": train, "b": train}).save_to_disk(str(tmp_path / "odd"))
    for name in ("one", "chosen"):
        expected = datasets.load_from_disk(str(tmp_path / name))["body"][:]
        assert read(tmp_path, path=str(tmp_path / name), text_column="body") == expected
    assert read(tmp_path, path=str(tmp_path / "both"), text_column="body") == train["body"][:]
    assert read(tmp_path, path=str(tmp_path / "both" / "test"), text_column="body") == ["a"]
    with pytest.raises(CorpusError, match="splits a, b; name one, as odd/SPLIT"):
        read(tmp_path, path=str(tmp_path / "odd"))


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(words, min_size=1, max_size=30), unit_bytes=st.integers(1, 60), end=st.booleans())
def test_slices_of_lines_read_each_line_once(tmp_path_factory, lines, unit_bytes, end):
    folder = tmp_path_factory.mktemp("slices")
    (folder / "x.txt").write_text("\n".join(lines) + "\n" * end, encoding="utf-8")
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n" * end)
    expected = [line for line in lines if line]
    if any(lines):
        assert read(folder, unit_bytes, path=str(folder / "x.txt"), documents="line") == expected
        assert read(folder, unit_bytes, path=str(folder / "x.jsonl")) == expected


def test_small_files_share_a_unit(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("0123456789")
    units = planned(tmp_path, 40, path=str(tmp_path))
    assert [len(unit.slices) for unit in units] == [4, 4, 2]


@pytest.mark.parametrize(
    ("content", "name", "options", "message"),
    [
        (b"a\0b", "x.txt", {}, r"corpus\.sources\.0\.path: '.*x\.txt': is binary"),
        (b"caf\xe9", "x.txt", {}, r"corpus\.sources\.0\.path: '.*x\.txt': is not UTF-8 text \(byte 3"),
        (b"caf\xe9\n", "x.txt", {"documents": "line"}, "is not UTF-8 text"),
        (b'{"text": "a"}\n{"tex', "x.jsonl", {}, "line at byte 14 is not JSON"),
        (b"[1]\n", "x.jsonl", {}, "line at byte 0 is not a JSON object"),
        (b'{"body": "a", "n": 1}\n', "x.jsonl", {}, r"text_column: 'text': .* no such column; it has body, n"),
        (b'{"text": 3}\n', "x.jsonl", {}, r"text_column: 'text': the column holds int"),
        (b"not parquet", "x.parquet", {}, r"corpus\.sources\.0\.path: '.*x\.parquet': cannot be read"),
        (b"not gzip", "x.txt.gz", {}, r"corpus\.sources\.0\.path: '.*x\.txt\.gz': cannot be read"),
        (b"text", "x.txt", {"format": "datasets"}, "save_to_disk"),
        (b"", "x.txt", {}, "holds no files, or only empty ones"),
    ],
)
def test_bad_text_ends_in_one_line(tmp_path, content, name, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as raised:
        read(tmp_path, path=str(tmp_path), **options)
    assert "\n" not in str(raised.value)


def test_a_column_that_is_missing_or_holds_no_text(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.text_column: 'text': .*no such column; it has body, n"):
        read(tmp_path, path=str(tmp_path))
    with pytest.raises(CorpusError, match="the column holds int64"):
        read(tmp_path, path=str(tmp_path), text_column="n")


@pytest.mark.parametrize("path", ["nothing-here", "file:///nothing/here", "nope://bucket/x"])
def test_places_that_are_not_there(tmp_path, path):
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.path"):
        read(tmp_path, path=path)


def test_names_default_and_clash(tmp_path):
    named = expand_sources([Source(path="a"), Source(path="b", name="b"), Source(path="c")], tmp_path, LIMITS)
    assert [item.name for item in named] == ["source-0", "b", "source-2"]
    with pytest.raises(ConfigError, match="source-0"):
        expand_sources([Source(path="a"), Source(path="b", name="source-0")], tmp_path, LIMITS)
