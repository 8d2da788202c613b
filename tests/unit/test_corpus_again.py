"""A run's own corpus as the text of another run: what was held out once is never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.stages.corpus import build, input_identity
from moedisco_ray.stages.corpus.documents import DOCUMENTS

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "seven", "grey", "hills", "empty"]


def prose(seed: int, paragraphs: int) -> str:
    generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
    return "\n\n".join(f"{' '.join(generator.choice(WORDS, 20))} {seed}x{i}." for i in range(paragraphs))


def config(sources: list[dict[str, Any]], seed: int = 0, **corpus: Any) -> RunConfig:
    return check_config(
        {
            "name": "t",
            "seed": seed,
            "corpus": {"sources": sources, "sequence_length": 32, "validation_fraction": 0.1, **corpus},
            "tokenizer": {"train_vocab_size": 320},
            "clusters": {"count": 2},
        }
    )


def dense(number: int) -> str:
    """Text with more tokens than its bytes suggest."""
    return " ".join(f"{number}x{i}\u263a\u2602\u2603\u265e" for i in range(60))


def made(directory: Path, settings: RunConfig) -> dict[str, pa.Table]:
    directory.mkdir()
    build(settings, directory)
    return {side: pq.read_table(directory / side) for side in ("train", "validation")}


def marks(table: pa.Table) -> set[str]:
    """The words that stand in one paragraph only."""
    return {word for text in table["text"].to_pylist() for word in text.split() if "x" in word}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, pa.Table]]:
    """A corpus of running text, of rows, and of rows with too many tokens for their bytes, which are cut in the end."""
    home = tmp_path_factory.mktemp("first")
    (home / "running.txt").write_text(prose(0, 600))
    (home / "rows.jsonl").write_text("\n".join(json.dumps({"text": prose(i, 3)}) for i in range(1, 60)))
    (home / "dense.jsonl").write_text("\n".join(json.dumps({"text": dense(i)}) for i in range(100, 140)))
    sources = [{"path": str(home / name), "name": name[:4]} for name in ("running.txt", "rows.jsonl", "dense.jsonl")]
    return home / "corpus", made(home / "corpus", config(sources))


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {}),
        (0, {"validation_fraction": 0.01}),
        (5, {"validation_fraction": 0.4}),
        (2, {"sequence_length": 16, "max_document_tokens": 16}),
    ],
)
def test_what_a_run_held_out_is_held_out_when_its_corpus_is_read_again(
    first: tuple[Path, dict[str, pa.Table]], tmp_path: Path, seed: int, changes: dict[str, Any]
) -> None:
    directory, tables = first
    settings = config([{"path": f"{directory}/*/*.parquet"}], seed, **changes)
    again = made(tmp_path / "again", settings)
    for side in ("train", "validation"):
        assert marks(again[side]) == marks(tables[side])
        if not changes.get("max_document_tokens"):
            assert set(again[side]["text"].to_pylist()) == set(tables[side]["text"].to_pylist())
        assert set(again[side]["group"].to_pylist()) == set(tables[side]["group"].to_pylist())
        assert set(again[side]["held_out"].to_pylist()) == {side == "validation"}
    third = made(tmp_path / "third", config([{"path": f"{tmp_path}/again/*/*.parquet"}], seed + 7))
    assert marks(third["validation"]) == marks(tables["validation"])


def test_parts_of_a_document_with_too_many_tokens_keep_its_group(first: tuple[Path, dict[str, pa.Table]]) -> None:
    sides: dict[bytes, set[bool]] = {}
    documents = pa.concat_tables(first[1].values())
    assert documents.schema.equals(DOCUMENTS)
    for group, held_out in zip(documents["group"].to_pylist(), documents["held_out"].to_pylist(), strict=True):
        sides.setdefault(group, set()).add(held_out)
    assert all(len(found) == 1 for found in sides.values())
    dense = documents.filter(pa.compute.equal(documents["source"], "dens"))
    assert len(set(dense["group"].to_pylist())) == 40 < len(dense)


def test_held_out_text_stays_so_next_to_the_text_that_it_came_from(
    first: tuple[Path, dict[str, pa.Table]], tmp_path: Path
) -> None:
    """The same documents come in as new text first; another seed would hold out others."""
    directory, tables = first
    rows = {"path": str(directory.parent / "rows.jsonl"), "name": "rows"}
    again = made(tmp_path / "again", config([rows, {"path": f"{directory}/*/*.parquet", "name": "again"}], seed=3))
    held_out = set(tables["validation"]["text"].to_pylist())
    assert held_out <= set(again["validation"]["text"].to_pylist())
    assert not held_out & set(again["train"]["text"].to_pylist())


def test_training_text_alone_is_split_as_any_other(first: tuple[Path, dict[str, pa.Table]], tmp_path: Path) -> None:
    directory, tables = first
    again = made(tmp_path / "again", config([{"path": f"{directory}/train"}], seed=3))
    assert len(again["validation"]) > len(tables["train"]) * 0.05
    assert marks(again["train"]) | marks(again["validation"]) == marks(tables["train"])


def test_a_corpus_that_another_tool_wrote_again_keeps_its_split(
    first: tuple[Path, dict[str, pa.Table]], tmp_path: Path
) -> None:
    """Some tools write ids as variable-length bytes, and one file of it all."""
    table = pa.concat_tables(first[1].values())
    table = table.set_column(table.schema.get_field_index("group"), "group", table["group"].cast(pa.binary()))
    pq.write_table(table, tmp_path / "all.parquet")
    again = made(tmp_path / "again", config([{"path": str(tmp_path / "all.parquet")}], seed=3))
    assert marks(again["validation"]) == marks(first[1]["validation"])


def test_a_table_with_only_some_of_the_columns_is_any_table(tmp_path: Path) -> None:
    texts = prose(0, 60).split("\n\n")
    pq.write_table(pa.table({"text": texts, "group": ["a"] * 60, "held_out": [True] * 60}), tmp_path / "x.parquet")
    again = made(tmp_path / "again", config([{"path": str(tmp_path / "x.parquet")}]))
    assert len(again["train"]) > 40


def test_the_corpus_is_made_again_when_its_form_on_disk_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text(prose(0, 3))
    settings = config([{"path": str(tmp_path / "x.txt")}])
    before = input_identity(settings)
    monkeypatch.setattr("moedisco_ray.stages.corpus.sources.DOCUMENTS", DOCUMENTS.remove(0))
    assert input_identity(settings)["corpus"] != before["corpus"]
