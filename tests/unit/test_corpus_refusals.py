"""What a corpus of mixed files reads and says: files with misleading names, files that are left out, tables."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from corpus_sources import documents_of, scattered

from moedisco_ray.core.config import RunConfig, Source, check_config
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.records.findings import left_out
from moedisco_ray.core.records.summaries import CorpusSummary
from moedisco_ray.stages.corpus import build, probe
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits

SENTENCE = "The grey hills were seven, and rain fell over number {} of them all day long.\n\n"
PROSE = "".join(SENTENCE.format(i) for i in range(400))
ROWS = ["plain", 'with "quotes", and a comma', "two\nlines", "NA", "", "naïve 語"]


def read(path: Path, **settings: Any) -> list[str]:
    (item,) = expand_sources([Source(path=str(path), **settings)], path.parent / "scratch", Limits(1024, 8192))
    units = plan_units([(item, list_files(item.field, item.settings).files)])
    return [document.text for unit in units for document in documents_of(unit)]


def config(sources: list[dict[str, Any]], **corpus: Any) -> RunConfig:
    return check_config(
        {
            "name": "t",
            "corpus": {"sources": sources, "sequence_length": 32, "validation_fraction": 0.1, **corpus},
            "tokenizer": {"train_vocab_size": 320},
            "clusters": {"count": 2},
        }
    )


@pytest.mark.parametrize(
    ("ending", "delimiter", "pack"),
    [
        (".csv", ",", bytes),
        (".csv.gz", ",", gzip.compress),
        (".csv.bz2", ",", bz2.compress),
        (".csv.zst", ",", lambda data: pa.compress(data, "zstd", asbytes=True)),
    ],
)
def test_csv_is_read_as_the_standard_library_writes_it(tmp_path: Path, ending: str, delimiter: str, pack: Any) -> None:
    plain = tmp_path / "plain"
    with plain.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["n", "body"])
        writer.writerows(enumerate(ROWS))
    (tmp_path / f"x{ending}").write_bytes(pack(plain.read_bytes()))
    assert read(tmp_path / f"x{ending}", text_column="body") == [text for text in ROWS if text]
    with pytest.raises(CorpusError, match=r"sources\.0\.text_column: 'text': .* has no such column; it has n, body"):
        read(tmp_path / f"x{ending}")


def test_a_quotation_mark_in_tsv_is_text(tmp_path: Path) -> None:
    """As in English Wikipedia or COCO captions: a field may begin with a mark that nothing closes."""
    rows = ['"To be', "or not", '5" pipe', '"quoted"', 'a "b" c', "comma, here"]
    (tmp_path / "x.tsv").write_text("n\tbody\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(rows)))
    assert read(tmp_path / "x.tsv", text_column="body") == rows
    (tmp_path / "y.csv").write_text((tmp_path / "x.tsv").read_text())
    assert read(tmp_path / "y.csv", text_column="body", format="tsv") == rows


def listed(folder: Path, **settings: Any) -> tuple[list[str], list[str], list[str]]:
    """Names of the files of a folder that are read, left out, and passed over."""
    listing = list_files("corpus.sources.0", Source(path=str(folder), **settings))
    return names_of(listing.files), names_of(listing.skipped), names_of(listing.passed_over)


def names_of(files: Sequence[Any]) -> list[str]:
    return [Path(each.path).name for each in files]


def test_plain_text_that_is_passed_over_is_counted_listed_and_warned_of(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(PROSE)
    (folder / "empty.md").touch()
    assert listed(folder)[2] == []
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": SENTENCE.format(i)}) for i in range(300)))
    assert listed(folder)[0] == ["rows.jsonl"]
    settings = config([{"path": str(folder), "name": "text"}])
    (tmp_path / "made").mkdir()
    summary = build(settings, tmp_path / "made")
    assert (summary["skipped_files"], summary["passed_over_files"]) == (0, 30)
    assert summary["skipped"][0] == {
        "source": "text",
        "path": str(folder / "00.txt"),
        "reason": "is plain text next to tables",
    }
    for warnings in (summary["warnings"], probe(settings).warnings):
        assert [warning for warning in warnings if "30 files were passed over" in warning]
        assert not any("on_error" in warning for warning in warnings)
    notes = left_out(CorpusSummary.model_validate(summary))
    assert notes[0].endswith("00.txt is plain text next to tables")
    assert notes[-1] == "and 10 more files"
    assert listed(folder, exclude=("*.txt", "*.md"))[2] == []
    assert len(listed(folder, format="text")[0]) == 31


def test_a_state_file_of_another_program_is_no_data_set(tmp_path: Path) -> None:
    for content in (
        '{"text": "a", "step": 3}',
        "[1]",
        '{"_data_files": 3}',
        '{"_data_files": [{"name": "x"}]}',
        "not JSON",
    ):
        (tmp_path / "rows.jsonl").write_text('{"text": "b"}')
        (tmp_path / "state.json").write_text(content)
        assert listed(tmp_path)[0] == ["rows.jsonl", "state.json"]
        assert read(tmp_path, exclude=("state.json",)) == ["b"]
    with pytest.raises(CorpusError, match="is not a folder that save_to_disk wrote"):
        read(tmp_path, format="datasets")


def test_files_of_a_saved_data_set_may_be_excluded_and_must_not_be_missing(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"]}).save_to_disk(str(folder), num_shards=2)
    first, second = sorted(folder.glob("*.arrow"))
    (folder / "notes.txt").write_text("about")
    assert listed(folder) == ([first.name, second.name], [], ["notes.txt"])
    assert read(folder, exclude=(first.name,)) == ["c", "d"]
    with pytest.raises(CorpusError, match="holds no files"):
        read(folder, exclude=("*.arrow",))
    first.unlink()
    with pytest.raises(CorpusError, match=rf"sources\.0\.path: '{first}': is missing, .*state\.json.* save .* again"):
        read(folder)
    assert listed(folder, on_error="skip")[:2] == ([second.name], [first.name])
    assert read(folder, exclude=(first.name,)) == ["c", "d"]


@pytest.mark.parametrize(("name", "content"), [("x.jsonl", json.dumps({"text": PROSE})), ("x.txt", "x" * 4000)])
def test_text_that_is_one_document_is_refused_as_such(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "made").mkdir()
    with pytest.raises(CorpusError, match="is one document or one short passage") as raised:
        build(config([{"path": str(tmp_path / name), "documents": "file"}], validation_fraction=0.4), tmp_path / "made")
    assert raised.value.field == "corpus.sources"
    assert "documents" in raised.value.remedy
    assert "validation_fraction" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.txt",
            PROSE.encode() + b"caf\xe9",
            rf"is not UTF-8 text \(byte {len(PROSE) + 3} is 0xE9, as in Latin-1\).*iconv.*on_error",
        ),
        ("x.txt", PROSE.encode("utf-16"), r"is UTF-16, not UTF-8.*iconv"),
        ("x.txt", PROSE.encode("utf-16-le"), r"looks like UTF-16 \(byte 1 is zero\)"),
        ("x.txt", PROSE.encode() + b"\0\1\2", rf"is binary, not text \(byte {len(PROSE)} is zero\)"),
        ("x.txt", b"\0\1", r"is binary, not text \(byte 0 is zero\)"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"is not UTF-8 text \(byte 24 is 0xE9"),
        ("x.csv", b"text\n\xe9\n", r"cannot be read \(.*UTF8"),
        ("x.warc.gz", b"WARC/1.0", r"is a web archive; extract its text first"),
        ("x.html", b"<p>", r"is markup; .* by format: text\. Known endings: \.jsonl .*\.txt"),
        ("x.dat", b"1 2 3", r"has the unknown ending \.dat; "),
    ],
)
def test_what_is_not_utf8_text_is_refused_by_file_place_and_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as raised:
        read(tmp_path)
    assert str(raised.value).startswith(f"corpus.sources.0.path: '{tmp_path / name}': ")
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_is_no_text_and_format_text_forces_an_ending(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "LICENSE").write_text("three")
    assert read(tmp_path, format="text") == ["three", "one\ntwo"]
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "four"}')
    assert read(tmp_path / "rows.jsonl") == ["four"]


def test_excluded_files_are_not_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.log", "drafts/c.txt", "deep/drafts/d.txt", "deep/e.dat", ".hidden/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path, exclude=("*.log", "*.dat")) == ["a.txt", "deep/drafts/d.txt", "drafts/c.txt"]
    assert read(tmp_path, exclude=("*.log", "*.dat", "drafts/**")) == ["a.txt", "deep/drafts/d.txt"]
    assert read(tmp_path, exclude=("*.log", "*.dat", "**/drafts/*")) == ["a.txt"]
    assert read(tmp_path / "**" / "*.txt", exclude=("drafts/*",)) == ["a.txt", "deep/drafts/d.txt"]


def mixed(folder: Path) -> Path:
    folder.mkdir()
    (folder / "good.txt").write_text(PROSE)
    (folder / "latin.txt").write_bytes(PROSE.replace("rain", "snow").encode() + b"caf\xe9 \xe9")
    (folder / "empty.txt").touch()
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "zeros.md").write_bytes(b"\0\0")
    return folder


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_unreadable_files_are_left_out_whole_counted_and_listed(tmp_path: Path) -> None:
    folder = mixed(tmp_path / "mixed")
    (tmp_path / "made").mkdir()
    summary = build(config([{"path": str(folder), "name": "mixed", "on_error": "skip"}]), tmp_path / "made")
    assert summary["skipped_files"] == 3
    assert [(each["source"], Path(each["path"]).name) for each in summary["skipped"]] == [
        ("mixed", "latin.txt"),
        ("mixed", "picture.png"),
        ("mixed", "zeros.md"),
    ]
    assert summary["skipped"][0]["reason"] == f"is not UTF-8 text (byte {len(PROSE) + 3} is 0xE9, as in Latin-1)"
    assert (summary["sources"]["mixed"]["files"], summary["sources"]["mixed"]["empty_files"]) == (1, 1)
    assert any("3 files could not be read" in warning for warning in summary["warnings"])
    notes = "\n".join(left_out(CorpusSummary.model_validate(summary)))
    assert all(name in notes for name in ("latin.txt", "picture.png", "zeros.md"))
    # Not a line of the file stays, though thousands came before the byte that is wrong.
    (tmp_path / "alone").mkdir()
    alone = build(config([{"path": str(folder / "good.txt"), "name": "mixed"}]), tmp_path / "alone")
    assert summary["documents"] == alone["documents"]
    assert contents(tmp_path / "made") == contents(tmp_path / "alone")


def test_what_is_left_out_does_not_depend_on_how_the_reading_is_cut(tmp_path: Path) -> None:
    rows = [json.dumps({"text": SENTENCE.format(i)}).encode() for i in range(300)]
    for name, bad in (("a.jsonl", ()), ("b.jsonl", (10, 200)), ("c.jsonl", (299,))):
        lines = (b"{" if i in bad else row.replace(b"rain", name.encode()) for i, row in enumerate(rows))
        (tmp_path / name).write_bytes(b"\n".join(lines))
    settings = config([{"path": str(tmp_path / "*.jsonl"), "on_error": "skip"}])
    found = []
    for name, options in (("x", {}), ("y", {"unit_bytes": 3000, "engine": scattered})):
        (tmp_path / name).mkdir()
        found.append((build(settings, tmp_path / name, **options), contents(tmp_path / name)))
    assert found[0] == found[1]
    assert [Path(each["path"]).name for each in found[0][0]["skipped"]] == ["b.jsonl", "c.jsonl"]


def test_a_source_of_nothing_but_unreadable_files_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\0")
    (tmp_path / "made").mkdir()
    with pytest.raises(CorpusError, match=r"1 files were left out, the first since it is binary"):
        build(config([{"path": str(tmp_path / "x.txt"), "on_error": "skip"}]), tmp_path / "made")


def test_a_probe_finds_what_would_end_the_run_and_reads_little(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text(PROSE * 200)  # 6 MB
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "rows.jsonl").write_text('{"body": "a"}')
    (tmp_path / "blank.txt").write_text(" \n")
    mixed(tmp_path / "mixed")
    sources = [
        {"path": str(tmp_path / "good.txt"), "name": "good"},
        {"path": str(tmp_path / "latin.txt")},
        {"path": str(tmp_path / "rows.jsonl")},
        {"path": str(tmp_path / "blank.txt")},
        {"path": str(tmp_path / "none*.txt")},
        {"path": str(tmp_path / "mixed"), "name": "mixed", "on_error": "skip"},
    ]
    found = probe(config(sources))
    assert [(problem.field, problem.remedy.partition(" ")[0]) for problem in found.problems] == [
        ("corpus.sources.1.path", "is"),
        ("corpus.sources.2.text_column", str(tmp_path / "rows.jsonl")),
        ("corpus.sources.3.path", "holds"),
        ("corpus.sources.4.path", "holds"),
    ]
    assert found.sample["good"][0] == SENTENCE.format(0).strip()
    assert sum(map(len, found.sample["good"])) < 100_000
    assert found.documents["good"] == pytest.approx(len(PROSE) * 200 / len(SENTENCE), rel=0.1)
    assert any("3 files could not be read" in warning for warning in found.warnings)
    assert probe(config([{"path": "embedded"}])).problems == ()
    (tmp_path / "few.txt").write_text(SENTENCE * 3)
    few = probe(config([{"path": str(tmp_path / "few.txt")}]))
    assert any("documents are in clusters 0 (1), 1 (1)" in warning for warning in few.warnings)
