"""A small corpus with everything that the corpus stage decides on.

It has all formats, groups and weights, duplicates, and damage.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.stages.corpus import build
from moedisco_ray.stages.corpus.readers import Unit, read_slice
from moedisco_ray.stages.corpus.reading import ReadUnit
from moedisco_ray.stages.tables import InProcess
from moedisco_ray.stages.text.cutting import Document


def sentences(name: str, count: int) -> list[str]:
    return [f"{name} says: {i} is {'odd' if i % 2 else 'even'} and {i * i} is its square." for i in range(count)]


def odd(row: dict[str, object]) -> dict[str, object] | None:
    return row if " is odd " in str(row["text"]) else None


def shuffled_clauses(count: int) -> list[str]:
    """Long texts; after every third, one follows that repeats most of it."""
    texts: list[str] = []
    for i in range(count):
        words = [f"word{(i * 37 + j * j) % 500}" for j in range(120)]
        texts.append(" ".join(words))
        if i % 3 == 0:
            texts.append(" ".join([*words[:118], "changed", str(i)]))
    return texts


def write_jsonl(path: Path, texts: list[str], end: str = "\n") -> None:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + end)


def config_of(folder: Path, function: str = "corpus_sources:odd", **corpus: object) -> RunConfig:
    """Write the sources below a folder, and return the configuration of a run that reads them.

    Args:
        folder: The folder.
        function: A function that changes or drops rows; Ray's processes cannot import those of tests.
        corpus: Settings of the section `corpus`.
    """
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.txt").write_text("\n\n".join(sentences(f"text{i}", 40)))
    running = " ".join(sentences("running", 300)) + "\n\n" + "\n".join(sentences("more", 300))
    (folder / "running.txt").write_text(running)
    write_jsonl(folder / "rows.jsonl", [*sentences("rows", 60), *sentences("text0", 10)])
    pq.write_table(pa.table({"body": sentences("table", 60)}), folder / "table.parquet", row_group_size=7)
    write_jsonl(folder / "similar.jsonl", shuffled_clauses(60))
    (folder / "damaged").mkdir()
    write_jsonl(folder / "damaged" / "a.jsonl", [*sentences("rows", 60), *sentences("damaged", 60)], "\n{no row")
    write_jsonl(folder / "damaged" / "b.jsonl", sentences("whole", 90))
    (folder / "damaged" / "c.bin").write_bytes(b"\0")
    (folder / "first.txt").write_text("\n".join(sentences("first", 300)))
    (folder / "first").mkdir()
    build(
        check_config(
            {
                "name": "first",
                "seed": 5,
                "tokenizer": {"train_vocab_size": 350},
                "corpus": {
                    "sequence_length": 32,
                    "validation_fraction": 0.2,
                    "sources": [{"path": str(folder / "first.txt")}],
                },
            }
        ),
        folder / "first",
    )
    return check_config(
        {
            "name": "t",
            "tokenizer": {"train_vocab_size": 350},
            "clusters": {"count": 2},
            "corpus": {
                "sequence_length": 32,
                "validation_fraction": 0.1,
                **corpus,
                "sources": [
                    {"path": str(folder / "damaged"), "name": "damaged", "on_error": "skip", "weight": 0.7},
                    {"path": str(folder / "text"), "documents": "paragraph", "name": "text", "weight": 1.5},
                    {"path": str(folder / "rows.jsonl"), "name": "rows"},
                    {"path": str(folder / "rows.jsonl"), "name": "odd", "map": function},
                    {"path": str(folder / "running.txt"), "name": "running"},
                    {"path": f"file://{folder}/table.parquet", "text_column": "body"},
                    {"path": str(folder / "similar.jsonl"), "name": "similar"},
                    {"path": str(folder / "first" / "*" / "*.parquet"), "name": "first"},
                ],
            },
        }
    )


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


_ROWS = 3


class Scattered(InProcess):
    """Tables cut into pieces of a few rows that change their order, before and after they are brought together."""

    def grouped(self, count: int) -> Scattered:
        pieces = [table.slice(start, _ROWS) for table in self.tables() for start in range(0, len(table), _ROWS)]
        joined = InProcess(lambda: pieces[::-1], self.scratch).grouped(count)
        return dataclasses.replace(self, tables=lambda: list(joined.tables())[::-1])


def scattered(
    units: Sequence[Any],
    read: Callable[[Any], Iterable[pa.Table]],
    here: Sequence[pa.Table] = (),
    size: int | None = None,
) -> Scattered:
    """An engine whose tables are those of no other: small, and in reverse order."""
    del size
    assert isinstance(read, ReadUnit)
    found = [*here, *(table for unit in units[::-1] for table in read(unit, 900))]
    return Scattered(lambda: found, Path())


def documents_of(unit: Unit) -> list[Document]:
    """The documents of a unit, as its slices are read."""
    return [document for piece in unit.slices for document in read_slice(unit.source, piece)]
