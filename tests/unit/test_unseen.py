"""Text and tasks to judge a model on: what is read of them, what is left out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moedisco_ray.core.config import Source
from moedisco_ray.core.config.task_files import read_task_file
from moedisco_ray.core.errors import ConfigError, CorpusError
from moedisco_ray.stages.corpus import read_unseen
from moedisco_ray.stages.corpus.documents import document_id
from moedisco_ray.stages.corpus.unseen import read_spread
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.tokenizer import Encoder, save_trained, train_bpe

LIMITS = Limits(128, 1024)


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    """Of few pairs: about a token per byte."""
    save_trained(train_bpe(["zz"], 300), tmp_path / "tokenizer")
    return Encoder(tmp_path / "tokenizer")


def source(tmp_path: Path, stem: str, lines: list[str], **settings: Any) -> Source:
    path = tmp_path / f"{stem}.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return Source(path=str(path), documents="line", **settings)


def test_each_source_gets_its_share_in_the_order_of_its_lines(tmp_path: Path, encoder: Encoder) -> None:
    sources = [
        source(tmp_path, "a", ["aaaa", "bbbb", "", "cccccccc", "dd"], name="first"),
        source(tmp_path, "b", ["e" * 99, "f"]),
        source(tmp_path, "c", ["bbbb", "gggg", "gggg", "h"]),
    ]
    samples, left_out, _ = read_unseen(sources, encoder, 3 * 12, LIMITS)
    assert [(sample.source, sample.text) for sample in samples] == [
        ("first", "aaaa"),
        ("first", "bbbb"),
        ("unseen-1", "e" * 12),
        ("unseen-2", "gggg"),
    ]
    assert left_out == 0
    for key, name, text, tokens, _ in samples:
        assert key == document_id("e" * 99 if name == "unseen-1" else text)  # cut, but the same document
        assert len(tokens) == len(text)
        assert encoder.decode([tokens]) == [text]


def test_only_what_is_needed_is_read(tmp_path: Path, encoder: Encoder) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("\n".join(f"line {i}" for i in range(200)), encoding="utf-8")
    (tmp_path / "folder" / "b.txt").write_bytes(b"\0")  # nobody could read it
    folder = Source(path=str(tmp_path / "folder"), documents="line")
    assert len(read_unseen([folder], encoder, 100, LIMITS)[0]) > 5
    with pytest.raises(CorpusError, match=r"evaluation\.sources\.0\.path: .*is binary"):
        read_unseen([folder], encoder, 100_000, LIMITS)


def test_what_was_trained_on_is_left_out(tmp_path: Path, encoder: Encoder) -> None:
    parts = [tmp_path / "part-0.parquet", tmp_path / "part-1.parquet"]
    for part, texts in zip(parts, (["aaaa", "x"], ["cccc"]), strict=True):
        pq.write_table(
            pa.table({"id": pa.array([document_id(text) for text in texts], pa.binary(16)), "text": texts}), part
        )
    known = source(tmp_path, "a", ["aaaa", "bbbb", "cccc"])
    samples, left_out, _ = read_unseen([known], encoder, 1000, LIMITS, parts)
    assert ([sample.text for sample in samples], left_out) == (["bbbb"], 2)
    with pytest.raises(CorpusError, match=r"evaluation\.sources\.1\.path: .*holds no text that was not trained on"):
        read_unseen([known, source(tmp_path, "b", ["cccc"])], encoder, 1000, LIMITS, parts)


def tasks(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "tasks.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


CHOICE = {"query": "q", "choices": ["a", "b"], "gold": 1}
COMPLETION = {"context": "c", "continuation": "d"}


def test_examples_keep_what_they_are_made_of(tmp_path: Path) -> None:
    odd = {**CHOICE, "query": "two\u2028lines"}
    assert read_task_file("f", tasks(tmp_path, {**CHOICE, "more": 1}, "", odd)) == [CHOICE, odd]
    assert read_task_file("f", tasks(tmp_path, COMPLETION)) == [COMPLETION]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((CHOICE, "{"), "line 2 is no example"),
        ((3,), "line 1 is no example"),
        (({**CHOICE, "gold": 2},), "line 1 is no example"),
        (({**CHOICE, "gold": -1},), "line 1"),
        (({**CHOICE, "gold": "a"},), "line 1"),
        (({**CHOICE, "choices": ["a"]},), "line 1"),
        (({**CHOICE, "choices": ["a", " "]},), "line 1"),
        (({**CHOICE, "query": ""},), "line 1"),
        (({"context": "c"},), "line 1"),
        (({**COMPLETION, "continuation": ""},), "line 1"),
        ((COMPLETION, CHOICE), "line 2 has another form than line 1"),
        ((), "holds no examples"),
        (("", " "), "holds no examples"),
    ],
)
def test_what_is_no_example_is_told_by_its_line(tmp_path: Path, rows: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^evaluation\.lm_eval\.0: .*tasks\.jsonl': {says}"):
        read_task_file("evaluation.lm_eval.0", tasks(tmp_path, *rows))


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not a text file"):
        read_task_file("f", tmp_path / "tasks.jsonl")


def test_a_spread_sample_does_not_depend_on_the_order_of_the_text(tmp_path: Path, encoder: Encoder) -> None:
    rows = [json.dumps({"text": f"row {i} about {i * i} things"}) for i in range(400)]
    found = []
    for name, order in (("forth", rows), ("back", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(order))
        samples, share = read_spread(str(tmp_path / f"{name}.jsonl"), encoder, 3000, LIMITS)
        found.append(([each.text for each in samples], share))
    assert found[0] == found[1]
    texts, share = found[0]
    positions = sorted(int(text.split()[1]) for text in texts)
    assert 2800 < sum(map(len, texts)) <= 3000
    assert positions[0] < 40
    assert positions[-1] >= 360
    assert share == pytest.approx(len(texts) / 400, rel=0.1)
