"""The corpus stage as functions of tables: the result depends on the texts alone, not on how tables divide them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_sources import config_of, contents, scattered, sentences, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.records.events import Event
from moedisco_ray.stages import tables
from moedisco_ray.stages.corpus import build, counting
from moedisco_ray.stages.corpus.documents import STAGED, dedupe_and_sort, staged_table
from moedisco_ray.stages.corpus.rules import Rules, extremes, split
from moedisco_ray.stages.tables import divided, in_process
from moedisco_ray.stages.text.cutting import Document


def made(config, directory, *engine, **options):
    directory.mkdir()
    return build(config, directory, *engine, **options), contents(directory)


@pytest.mark.parametrize("near_duplicates", [None, 0.7])
def test_the_result_depends_on_the_texts_alone(tmp_path, near_duplicates):
    config = config_of(tmp_path, near_duplicates=near_duplicates)
    summary, files = made(config, tmp_path / "tables")
    assert made(config, tmp_path / "scattered", scattered, unit_bytes=700) == (summary, files)
    assert summary["duplicates"] == 10 + 35
    assert (summary["near_duplicates"] > 19) == (near_duplicates is not None)
    assert summary["sources"]["odd"]["dropped_rows"] == 35


def test_of_a_damaged_file_nothing_is_read_though_its_damage_is_found_last(tmp_path):
    config = config_of(tmp_path)
    summary, _ = made(config, tmp_path / "made", scattered, unit_bytes=700)
    texts = {
        text
        for side in ("train", "validation")
        for path in (tmp_path / "made" / side).iterdir()
        for text in pq.read_table(path, columns=["text"])["text"].to_pylist()
    }
    assert not texts & set(sentences("damaged", 60))
    assert set(sentences("rows", 60)) & texts  # of the source after it, which has them too
    assert summary["skipped_files"] == 2
    reasons = [each["reason"] for each in summary["skipped"]]
    assert reasons == ["the line at byte 6968 is not JSON", "has the unknown ending .bin"]
    assert summary["sources"]["damaged"]["files"] == 1


def test_damage_is_an_error_unless_it_may_be_skipped(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", sentences("rows", 9), "\n{no row")
    config = check_config({"name": "t", "corpus": {"sources": [{"path": str(tmp_path / "x.jsonl")}]}})
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.path: .*is not JSON"):
        made(config, tmp_path / "made")


def test_a_source_of_damaged_files_alone_is_an_error_that_says_why(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", sentences("rows", 9), "\n{no row")
    source = {"path": str(tmp_path / "x.jsonl"), "on_error": "skip"}
    config = check_config({"name": "t", "corpus": {"sources": [source]}})
    with pytest.raises(CorpusError, match="and 1 files were left out, the first since it the line at"):
        made(config, tmp_path / "made")


def test_progress_counts_every_document_once(tmp_path):
    events = []
    made(config_of(tmp_path), tmp_path / "made", unit_bytes=700, events=events.append)
    done = {}
    for event in events:
        done[event.data["unit"]] = done.get(event.data["unit"], 0) + event.data["done"]
    sides = [pq.read_table(tmp_path / "made" / side) for side in ("train", "validation")]
    assert done["documents tokenized"] == sum(map(len, sides))
    assert done["documents read"] > done["documents tokenized"]
    shown = []
    count = counting(shown.append)
    for number in (2, 3):
        count(Event("stage_progress", "corpus", data={"done": number, "unit": "documents read"}))
    assert shown[0].data == {"done": 2, "total": None, "unit": "documents read"}


RULES = Rules(("a", "b"), (1.5, 0.6), 0.2, 3, 64)


def documents(numbers):
    """Documents of two sources, some of them equal."""
    found = [STAGED.empty_table()]
    for order in (0, 1):
        own = [Document(f"text {n}", begins=n % 3 > 0) for n in numbers if n % 2 == order]
        found.append(staged_table(own, order, bytes(16)))
    return dedupe_and_sort(pa.concat_tables(found))


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 500), min_size=2, max_size=60), st.integers(1, 40))
def test_decisions_are_the_same_however_documents_are_divided(numbers, size):
    table = documents(sorted(numbers))
    pieces = [table.slice(start, size) for start in range(0, len(table), size)]
    found = extremes(table, RULES)
    found_BS2 = np.stack([extremes(piece, RULES) for piece in pieces])
    np.testing.assert_array_equal(found_BS2[..., 0].min(axis=0), found[:, 0])
    np.testing.assert_array_equal(found_BS2[..., 1].max(axis=0), found[:, 1])
    rules = RULES.with_extremes(found)
    assert pa.concat_tables([split(piece, rules) for piece in pieces]).equals(split(table, rules))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_rows_are_divided_by_range_in_their_order(ranges):
    table = pa.table({"range": pa.array(ranges, pa.int64()), "row": list(range(len(ranges)))})
    found = {number: part["row"].to_pylist() for number, part in divided(table)}
    assert sorted(found) == sorted(set(ranges))
    for number, rows in found.items():
        assert rows == [row for row, each in enumerate(ranges) if each == number]


def test_a_row_of_a_user_is_no_note(tmp_path):
    """Notes about files are rows too: a document that looks like one is a document."""
    write_jsonl(tmp_path / "x.jsonl", [json.dumps([0, 1, "reason"]), *sentences("rows", 90)])
    config = check_config(
        {
            "name": "t",
            "clusters": {"count": 2},
            "tokenizer": {"train_vocab_size": 320},
            "corpus": {"sequence_length": 32, "sources": [{"path": str(tmp_path / "x.jsonl")}]},
        }
    )
    summary, _ = made(config, tmp_path / "made")
    assert summary["documents"] + summary["validation_documents"] == 91


@pytest.mark.parametrize("held", [1, 3000, 20_000])
def test_rows_that_do_not_fit_into_memory_are_brought_together_on_disk(tmp_path, monkeypatch, held):
    config = config_of(tmp_path, near_duplicates=0.7)
    expected = made(config, tmp_path / "memory")
    monkeypatch.setattr(tables, "HELD_BYTES", held)
    assert made(config, tmp_path / "disk", in_process(tmp_path / "scratch"), unit_bytes=700) == expected
    assert len(list((tmp_path / "scratch").iterdir())) > 1
