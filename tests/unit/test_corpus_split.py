"""Every source's share of the validation text, groups that stay together, and documents that are never too long."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.stages.corpus import build, read_unseen
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.validation import load_documents

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "over", "seven", "grey", "hills", "empty"]


def prose(seed: int, paragraphs: int, mark: str = "") -> str:
    generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
    return "\n\n".join(f"{mark} {' '.join(generator.choice(WORDS, 20))} {i}." for i in range(paragraphs))


def config(sources: list[dict[str, Any]], **corpus: Any) -> RunConfig:
    return check_config(
        {
            "name": "t",
            "corpus": {"sources": sources, "sequence_length": 32, "validation_fraction": 0.05, **corpus},
            "tokenizer": {"train_vocab_size": 320},
            "clusters": {"count": 2},
        }
    )


def made(directory: Path, sources: list[dict[str, Any]], **corpus: Any) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    directory.mkdir()
    summary = build(config(sources, **corpus), directory)
    return summary, {side: pq.read_table(directory / side) for side in ("train", "validation")}


def sides_in_order(tables: dict[str, pa.Table]) -> list[str]:
    """The side of each paragraph of `prose`, by the number at its end."""
    sides = {}
    for side, table in tables.items():
        for text in table["text"].to_pylist():
            sides[int(text.split()[-1].rstrip("."))] = side
    return [sides[number] for number in sorted(sides)]


def held_out(tables: dict[str, pa.Table], source: str) -> set[str]:
    validation = tables["validation"]
    return set(validation.filter(pa.compute.equal(validation["source"], source))["text"].to_pylist())


def test_every_source_gives_its_share_and_another_source_changes_nothing(tmp_path: Path) -> None:
    sources = []
    for i, paragraphs in enumerate((8, 30, 400)):
        (tmp_path / f"{i}.txt").write_text(prose(i, paragraphs))
        sources.append({"path": str(tmp_path / f"{i}.txt"), "name": f"s{i}"})
    alone, tables = made(tmp_path / "alone", sources[1:])
    everything, all_tables = made(tmp_path / "everything", sources)
    for name, source in everything["sources"].items():
        assert source["documents"] > 0, name
        assert source["validation_documents"] > 0, name
    assert set(alone["sources"]) == {"s1", "s2"}
    for name in ("s1", "s2"):
        assert held_out(tables, name) == held_out(all_tables, name)


def test_parts_of_a_document_and_neighbours_are_on_one_side(tmp_path: Path) -> None:
    """A long row's parts all have its mark; neighbours of running text are consecutive paragraphs."""
    rows = [json.dumps({"text": prose(i, 40, f"row{i}")}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "files").mkdir()
    for i in range(40):
        (tmp_path / "files" / f"{i}.txt").write_text(prose(1000 + i, 40, f"file{i}"))
    sources = [{"path": str(tmp_path / "rows.jsonl")}, {"path": str(tmp_path / "files"), "documents": "file"}]
    _, tables = made(tmp_path / "made", sources, validation_fraction=0.3)
    sides = defaultdict(set)
    parts: dict[str, int] = defaultdict(int)
    for side, table in tables.items():
        for text in table["text"].to_pylist():
            (mark,) = {word for word in text.split() if word.startswith(("row", "file"))}
            sides[mark].add(side)
            parts[mark] += 1
    assert len(sides) == 100
    assert all(len(found) == 1 for found in sides.values())
    assert all(count > 1 for count in parts.values())
    assert 10 < sum(found == {"validation"} for found in sides.values()) < 50

    (tmp_path / "running.txt").write_text(prose(7, 2000))
    _, tables = made(tmp_path / "running", [{"path": str(tmp_path / "running.txt")}], validation_fraction=0.3)
    order = sides_in_order(tables)
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert len(order) > 1000
    # eight neighbours at a time; one by one, it were eight times as many
    assert changes < len(order) * 2 * 0.3 * 0.7 / 8 * 1.5


def test_neighbouring_paragraphs_are_on_one_side_as_documents_of_running_text_are(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(prose(7, 2000))
    _, tables = made(
        tmp_path / "made", [{"path": str(tmp_path / "x.txt"), "documents": "paragraph"}], validation_fraction=0.3
    )
    order = sides_in_order(tables)
    assert len(order) == 2000
    changes = sum(a != b for a, b in itertools.pairwise(order))
    # eight at a time; one by one, it were 840
    assert 2000 / 9 * 2 * 0.3 * 0.7 * 0.5 < changes < 2000 / 7 * 2 * 0.3 * 0.7 * 1.5
    # Short text has groups enough for both sides all the same.
    (tmp_path / "short.txt").write_text(prose(8, 45))
    source = {"path": str(tmp_path / "short.txt"), "documents": "paragraph"}
    summary, _ = made(tmp_path / "short", [source], validation_fraction=0.3)
    assert 6 < summary["validation_documents"] < 25


@pytest.mark.parametrize("text", [prose(0, 3000), "x7Q" * 40_000, "語" * 20_000, " ".join(["word"] * 20_000)])
def test_no_document_has_more_tokens_than_the_limit(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": prose(5, 3)}))
    (tmp_path / "plain.txt").write_text(prose(9, 900) + text)
    sources = [
        {"path": str(tmp_path / "rows.jsonl"), "name": "rows"},
        {"path": str(tmp_path / "plain.txt"), "name": "plain"},
        {"path": str(tmp_path / "plain.txt"), "name": "file", "documents": "file"},
        {"path": str(tmp_path / "plain.txt"), "name": "line", "documents": "line"},
        {"path": str(tmp_path / "plain.txt"), "name": "paragraph", "documents": "paragraph"},
    ]
    _, tables = made(tmp_path / "made", sources, max_document_tokens=100)
    encoder = Encoder(tmp_path / "made" / "tokenizer")
    for table in tables.values():
        tokens = table["tokens"].to_pylist()
        assert max(map(len, tokens)) <= 100
        assert [ids.tolist() for ids in encoder.encode(table["text"].to_pylist())] == tokens
        ids = table["id"].to_pylist()
        assert len(set(ids)) == len(ids)
        assert ids == sorted(ids)


def test_an_evaluation_is_never_longer_than_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 2000))
    (tmp_path / "b.txt").write_text("unbroken" * 30_000)
    sources = [{"path": str(tmp_path / f"{name}.txt"), "name": name} for name in "ab"]
    summary, _ = made(tmp_path / "made", sources)
    parts = sorted((tmp_path / "made" / "validation").glob("*.parquet"))
    for most in (1, 20, 300, 2000):
        documents = load_documents(parts, most)
        measured = sum(map(len, documents.tokens))
        assert measured <= most
        assert measured > most - 256  # less than the longest document
        assert all(documents.texts)
    assert summary["validation_tokens"] > 2000
    encoder = Encoder(tmp_path / "made" / "tokenizer")
    unseen = config(
        [{"path": str(tmp_path / "b.txt"), "documents": "file"}, {"path": str(tmp_path / "a.txt")}]
    ).corpus.sources
    for most in (2, 50, 1000):
        samples, *_ = read_unseen(unseen, encoder, most, Limits(32, 256))
        assert 0 < sum(len(sample.tokens) for sample in samples) <= most


def test_text_that_was_trained_on_is_found_again_however_it_was_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 600) + "語" * 3000)
    summary, _ = made(tmp_path / "made", [{"path": str(tmp_path / "a.txt"), "name": "a"}])
    parts = sorted((tmp_path / "made" / "train").glob("*.parquet"))
    encoder = Encoder(tmp_path / "made" / "tokenizer")
    same = config([{"path": str(tmp_path / "a.txt")}]).corpus.sources
    found = read_unseen(same, encoder, 10**6, Limits(32, 256), parts)
    assert found.trained_on == summary["documents"]
    assert len(found.samples) == summary["validation_documents"]


def test_thin_text_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(0, 2000))
    (tmp_path / "again.txt").write_text(prose(0, 2000))
    (tmp_path / "short.txt").write_text(prose(3, 1))
    sources = [{"path": str(tmp_path / f"{name}.txt"), "name": name} for name in ("a", "again", "short")]
    summary, _ = made(tmp_path / "made", sources)
    warnings = " ".join(summary["warnings"])
    assert "nothing is left to train on from again:" in warnings
    assert "no validation documents from short:" in warnings
    (tmp_path / "rows.txt").write_text(prose(0, 60))
    summary, _ = made(tmp_path / "few", [{"path": str(tmp_path / "rows.txt"), "documents": "line", "name": "rows"}])
    assert len(summary["warnings"]) == 1
    assert "fewer than 30 validation documents from rows (" in summary["warnings"][0]


PEAK = """
import sys
from pathlib import Path
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.corpus.reading import ReadUnit
from moedisco_ray.core.config import Source
for name in sys.argv[1:]:
    path = Path(name)
    for documents in ("auto", "line"):
        (item,) = expand_sources([Source(path=str(path), documents=documents)], path.parent, Limits(1024, 8192))
        (unit,) = plan_units([(item, list_files(item.field, item.settings).files)], 1 << 40)
        read = sum(map(len, ReadUnit(4)(unit, 1 << 20)))
        assert read >= path.stat().st_size // 74_000     # bytes of the longest part
    status = Path('/proc/self/status').read_text().splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith('VmHWM')) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
def test_a_file_of_one_line_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """Reading a line of 24 MB takes hardly more memory than reading one of 2 MB."""
    paths = []
    for megabytes in (2, 24):
        paths.append(tmp_path / str(megabytes) / "x.txt")
        paths[-1].parent.mkdir()
        with paths[-1].open("w") as file:
            for i in range(megabytes):
                file.write(f"one line of many words {i} " * 40_000)
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *paths], capture_output=True, text=True, check=True, env=environment
    )
    first, second = map(int, done.stdout.split())
    assert second < first + 16, (first, second)
