"""Functions that change or drop rows of a source, against Hugging Face datasets and text cleaned beforehand."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_sources import documents_of, scattered

from moedisco_ray.core.config import RunConfig, Source, check_config
from moedisco_ray.core.errors import ConfigError, CorpusError, UserError
from moedisco_ray.core.records.summaries import CorpusSummary
from moedisco_ray.core.stages import fingerprints
from moedisco_ray.stages.corpus import build, input_identity, probe
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.row_map import RowMap
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Document, Limits
from tests.unit.chat_data import conversation, write_rows, write_tokenizer

ROWS = [
    {"body": f"number {i} of the grey hills, naïve 語", "language": ("en", "de", "")[i % 3], "n": str(i)}
    for i in range(200)
]
KEEP = """
def keep(row):
    if row["language"] != "en" or row["n"].endswith("4"):
        return None
    row["body"] = row["n"] + ": " + row["body"].upper()
    return row
"""
Module = Callable[[str], str]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Writes a Python module that can be imported, and returns its name."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # bytecode of the same second would hide a change
    name = "rows_of_a_user"

    def write(code: str) -> str:
        sys.modules.pop(name, None)
        (folder / f"{name}.py").write_text(code)
        return name

    yield write
    sys.modules.pop(name, None)


def documents(path: Path, **settings: Any) -> list[Document]:
    (item,) = expand_sources([Source(path=str(path), **settings)], path.parent / "scratch", Limits(32, 256))
    files = list_files(item.field, item.settings).files
    return [
        document for unit in plan_units([(item.sized(files[0].size), files)], 2000) for document in documents_of(unit)
    ]


def texts(path: Path, **settings: Any) -> list[str]:
    return [document.text for document in documents(path, **settings)]


def write_table(folder: Path, ending: str, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif ending == "":
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if ending == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.ecosystem("Text: Hugging Face datasets, and functions that change rows", "datasets")
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".parquet", ""])
def test_a_function_gets_and_returns_what_it_does_with_hugging_face_datasets(
    tmp_path: Path, module: Module, ending: str
) -> None:
    space: dict[str, Any] = {}
    exec(KEEP, space)
    keep = space["keep"]
    reference = datasets.Dataset.from_list(ROWS).filter(lambda row: keep(row) is not None).map(keep)
    path = write_table(tmp_path, ending, ROWS)
    assert texts(path, text_column="body", map=f"{module(KEEP)}:keep") == list(reference["body"])
    assert 0 < len(reference) < len(ROWS)


def grouped(found: Iterable[Document]) -> list[list[str]]:
    """Texts of documents by group."""
    groups: list[list[str]] = []
    for document in found:
        if document.begins:
            groups.append([])
        groups[-1].append(document.text)
    return groups


@pytest.mark.parametrize("unit", ["auto", "file", "paragraph", "line"])
def test_documents_of_plain_text_are_rows_and_groups_stay_apart(tmp_path: Path, module: Module, unit: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text(
        "".join(f"it rained on hill {i} all day {'long ' * (i % 7)}.\n" + "\n" * (i % 3 == 0) for i in range(400))
    )
    # It drops first, inner and last documents of groups.
    name = module("def keep(row):\n    return None if len(row['text']) % 4 == 0 else {'text': row['text'][::-1]}\n")
    groups = grouped(documents(path, documents=unit))
    found = grouped(documents(path, documents=unit, map=f"{name}:keep"))
    kept = []
    for group in groups:
        left = [text[::-1].strip("\n") for text in group if len(text) % 4]
        if left:
            kept.append(left)
    assert found == kept
    assert 0 < sum(map(len, found)) < sum(map(len, groups)) or unit == "file"


def test_a_longer_text_is_cut_again_and_stays_one_group(tmp_path: Path, module: Module) -> None:
    (tmp_path / "x.txt").write_text("the rain fell over the hill.\n" * 3)
    name = module("def keep(row):\n    return {'text': row['text'] * 100}\n")
    found = documents(tmp_path / "x.txt", documents="file", map=f"{name}:keep")
    assert [document.begins for document in found] == [True] + [False] * (len(found) - 1)
    assert len(found) > 1


def config_of(sources: list[dict[str, Any]], **sections: Any) -> RunConfig:
    corpus = {"sources": sources, "sequence_length": 32, "validation_fraction": 0.1}
    return check_config(
        {"name": "t", "corpus": corpus, "tokenizer": {"train_vocab_size": 320}, "clusters": {"count": 2}, **sections}
    )


def made(config: RunConfig, directory: Path, **options: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    directory.mkdir()
    summary = build(config, directory, **options)
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return summary, {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_a_corpus_is_that_of_text_cleaned_beforehand_and_counts_dropped_rows(tmp_path: Path, module: Module) -> None:
    space: dict[str, Any] = {}
    exec(KEEP, space)
    cleaned = [kept for row in ROWS if (kept := space["keep"](dict(row))) is not None]
    (tmp_path / "clean").mkdir()
    before = {
        "path": str(write_table(tmp_path, ".jsonl", ROWS)),
        "text_column": "body",
        "map": f"{module(KEEP)}:keep",
        "name": "a",
    }
    after = {"path": str(write_table(tmp_path / "clean", ".jsonl", cleaned)), "text_column": "body", "name": "a"}
    summary, files = made(config_of([before]), tmp_path / "one")
    again, same = made(config_of([before]), tmp_path / "two", unit_bytes=700, engine=scattered)
    plain, reference = made(config_of([after]), tmp_path / "three")
    assert files == same == reference
    assert summary == again
    record = CorpusSummary.model_validate(summary)
    assert record.sources["a"].dropped_rows == len(ROWS) - len(cleaned)
    assert plain["sources"]["a"]["dropped_rows"] == 0
    assert record.documents + record.validation_documents == len(cleaned)


def test_rows_become_conversations_and_ids(tmp_path: Path, module: Module) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    talks = [conversation(number) for number in range(80)]
    name = module(
        "def talk(row):\n    return {'messages': row['said'][1]} if row['said'][0] % 2 else None\n"
        "def numbers(row):\n    return {'input_ids': row['more'][:-1]}\n"
    )
    write_rows(tmp_path / "said.jsonl", "said", list(enumerate(talks)))
    write_rows(tmp_path / "chat.jsonl", "messages", talks[1::2])
    ids = [tokenizer(f"the question {number} is a number")["input_ids"] for number in range(40)]
    write_rows(tmp_path / "more.jsonl", "more", [[*each, 5] for each in ids])
    write_rows(tmp_path / "ids.jsonl", "input_ids", ids)
    mapped = [
        {"path": str(tmp_path / "said.jsonl"), "messages_column": "messages", "map": f"{name}:talk"},
        {"path": str(tmp_path / "more.jsonl"), "ids_column": "input_ids", "map": f"{name}:numbers"},
    ]
    direct = [
        {"path": str(tmp_path / "chat.jsonl"), "messages_column": "messages"},
        {"path": str(tmp_path / "ids.jsonl"), "ids_column": "input_ids"},
    ]
    usual = {"tokenizer": {"path": str(tmp_path / "tokenizer")}}
    summary, files = made(config_of(mapped, **usual), tmp_path / "one")
    _, reference = made(config_of(direct, **usual), tmp_path / "two")
    assert files == reference
    assert [source["dropped_rows"] for source in summary["sources"].values()] == [40, 0]


def test_rows_of_an_earlier_run_keep_their_side_of_the_split(tmp_path: Path, module: Module) -> None:
    path = write_table(tmp_path, ".jsonl", ROWS)
    made(config_of([{"path": str(path), "text_column": "body"}]), tmp_path / "first")
    held_out = {row["text"] for row in pq.read_table(tmp_path / "first" / "validation").to_pylist()}
    name = module("def keep(row):\n    text = row.pop('text')\n    row.clear()\n    return {'text': text + '!'}\n")
    again = config_of(
        [{"path": str(tmp_path / "first"), "exclude": ["*.json", "*.npy", "*.starts"], "map": f"{name}:keep"}], seed=5
    )
    made(again, tmp_path / "second")
    found = {row["text"] for row in pq.read_table(tmp_path / "second" / "validation").to_pylist()}
    assert found == {text + "!" for text in held_out}


BAD = """
import collections
table = {}
def fails(row):
    return {"text": int(row["text"])}
def number(row):
    return 3
def other(row):
    return {"body": 1}
def not_text(row):
    return {"text": [row["text"]]}
"""


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (
            "fails",
            ConfigError,
            r"sources\.0\.map: '\w+:fails': raises ValueError at rows_of_a_user\.py:5 .*rows\.jsonl \(invalid",
        ),
        (
            "number",
            ConfigError,
            r"sources\.0\.map: '\w+:number': returns int for a row of .*rows\.jsonl; return a dict, or None",
        ),
        (
            "other",
            CorpusError,
            r"sources\.0\.text_column: 'text': a row that \w+:other returns has no such column; it has body",
        ),
        (
            "not_text",
            CorpusError,
            r"sources\.0\.text_column: 'text': the column holds list in a row that \w+:not_text returns",
        ),
        ("table", ConfigError, r"sources\.0\.map: '\w+:table': is a dict, not a function"),
        ("absent", ConfigError, r"sources\.0\.map: '\w+:absent': cannot be imported \(AttributeError: .*PYTHONPATH"),
    ],
)
def test_a_mistake_of_the_function_is_one_line(
    tmp_path: Path, module: Module, function: str, kind: type[UserError], message: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", "text", ["one", "two"])
    source = {"path": str(tmp_path / "rows.jsonl"), "map": f"{module(BAD)}:{function}"}
    with pytest.raises(kind, match=message) as caught:
        made(config_of([source]), tmp_path / "made")
    assert "\n" not in str(caught.value)
    assert probe(config_of([source])).problems == ()  # it calls no function
    if kind is ConfigError:  # a mistake in code is no damaged file
        with pytest.raises(ConfigError, match=message):
            made(config_of([{**source, "on_error": "skip"}]), tmp_path / "skipped")


@pytest.mark.parametrize(
    ("code", "reason"), [("raise RuntimeError('broken')", "RuntimeError: broken"), ("(", "SyntaxError")]
)
def test_a_module_that_cannot_be_imported_is_one_line(tmp_path: Path, module: Module, code: str, reason: str) -> None:
    write_rows(tmp_path / "rows.jsonl", "text", ["one"])
    config = config_of([{"path": str(tmp_path / "rows.jsonl"), "map": f"{module(code)}:keep"}])
    with pytest.raises(ConfigError, match=reason):
        input_identity(config)


@pytest.mark.parametrize(
    "name", ["keep", "clean.keep", "clean:", ":keep", "clean:a.b", "clean:keep()", "../clean:keep", "a b:c"]
)
def test_a_function_is_named_by_module_and_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"sources\.0\.map"):
        config_of([{"path": str(tmp_path), "map": name}])


def test_a_source_of_which_nothing_is_left_says_so(tmp_path: Path, module: Module) -> None:
    write_rows(tmp_path / "rows.jsonl", "text", ["one", "two"])
    config = config_of([{"path": str(tmp_path / "rows.jsonl"), "map": f"{module('def keep(row): pass')}:keep"}])
    with pytest.raises(CorpusError, match=r"holds no documents.*rows_of_a_user:keep dropped 2 rows"):
        made(config, tmp_path / "made")


@pytest.mark.parametrize("section", ["corpus", "evaluate"])
def test_another_function_and_other_code_make_another_corpus(tmp_path: Path, module: Module, section: str) -> None:
    write_rows(tmp_path / "rows.jsonl", "text", ["one", "two"])
    write_rows(tmp_path / "more.jsonl", "text", ["three"])

    def digest(code: str, function: str = "keep") -> str:
        mapped = {"path": str(tmp_path / "rows.jsonl"), "map": f"{module(code)}:{function}"}
        text = [{"path": str(tmp_path / "more.jsonl")}]
        config = config_of([mapped]) if section == "corpus" else config_of(text, evaluation={"sources": [mapped]})
        return fingerprints(config, input_identity(config))[section]

    code = "def keep(row):\n    return row\nsame = keep\n"
    assert digest(code) == digest(code)
    assert len({digest(code), digest(code, "same"), digest(code.replace("row\n", "None\n"))}) == 3


def test_a_function_in_an_archive_has_the_digest_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl", "text", ["one", "two"])

    def digest(name: str, code: str) -> str:
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}.py", code)
        monkeypatch.syspath_prepend(tmp_path / f"{name}.zip")
        return RowMap("corpus.sources.0", f"{name}:keep").identity()

    assert (
        digest("archived", "def keep(row):\n    return row\n")
        != digest("others", "def keep(row):\n    return None\n")
        != ""
    )


def test_a_function_without_a_file_has_no_digest(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", "text", ["one", "two"])
    assert texts(tmp_path / "rows.jsonl", map="builtins:dict") == ["one", "two"]
    config = config_of([{"path": str(tmp_path / "rows.jsonl"), "map": "builtins:dict"}])
    assert input_identity(config)["corpus"]
