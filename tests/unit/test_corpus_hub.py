"""Data sets of the Hugging Face hub as sources, through a hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_standin import Hub, hub
from small_run import small_config

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages import corpus

NAME = "hf://datasets/tiny-org/wiki"
TRAIN, TEST = 40, 10
CARD = (
    """---
configs:
- config_name: whole
  default: true
  data_files: [{split: train, path: data/train-*}, {split: test, path: data/test-*}]
- config_name: small
  data_files: [{split: train, path: data/train-1.parquet}]
---
"""
    + "# A card, which is no text to train on\n" * 9
)


def article(i: int) -> str:
    return f"Article {i}. " + " ".join(f"word{i * j % 97}" for j in range(120))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "wiki"
    (folder / "data").mkdir(parents=True)
    for part, rows in (("train-0", range(25)), ("train-1", range(25, TRAIN)), ("test-0", range(TRAIN, TRAIN + TEST))):
        pq.write_table(pa.table({"text": [article(i) for i in rows]}), folder / "data" / f"{part}.parquet")
    (folder / "README.md").write_text(CARD)
    with hub(tmp_path / "hub-cache") as found:
        found.add("datasets/tiny-org/wiki", folder)
        yield found


def documents(tmp_path: Path, path: str, **settings: str) -> int:
    config = small_config(
        tmp_path / "runs",
        corpus={"sources": [{"path": path, **settings}], "validation_fraction": 0.1, "sequence_length": 64},
    )
    directory = tmp_path / "corpus"
    directory.mkdir()
    summary = corpus.build(config, directory)
    found: int = summary["documents"] + summary["validation_documents"]
    return found


@pytest.mark.ecosystem("Text: data set of a hub (a stand-in on loopback)", "huggingface-hub")
@pytest.mark.parametrize(
    ("path", "settings", "count"),
    [
        (NAME, {}, TRAIN + TEST),
        (f"{NAME}@main", {}, TRAIN + TEST),
        (f"{NAME}/data/train-*.parquet", {}, TRAIN),
        (f"{NAME}/data/test-0.parquet", {}, TEST),
        (NAME, {"split": "train"}, TRAIN),
        (f"{NAME}@main", {"split": "test"}, TEST),
        (NAME, {"split": "train", "subset": "small"}, TRAIN - 25),
    ],
)
def test_a_data_set_is_a_source_like_a_folder(
    server: Hub, tmp_path: Path, path: str, settings: dict[str, str], count: int
) -> None:
    assert documents(tmp_path, path, **settings) == count
    assert {authorization for _, _, authorization in server.requests} == {None}


def test_a_revision_is_read_as_it_was(server: Hub, tmp_path: Path) -> None:
    first = server.repositories["datasets/tiny-org/wiki"].branches["main"]
    server.add("datasets/tiny-org/wiki", {"data/train-0.parquet": b""})
    assert documents(tmp_path, f"{NAME}@{first}") == TRAIN + TEST


def test_a_private_data_set_needs_the_token(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repositories["datasets/tiny-org/wiki"].private = True
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert documents(tmp_path, NAME) == TRAIN + TEST


UNKNOWN = "no repository or revision that this machine may read at the hub; correct it, or set HF_TOKEN"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("hf://datasets/tiny-org/absent", UNKNOWN),
        (f"{NAME}@gone", UNKNOWN),
        (f"{NAME}/absent", "no such file or folder"),
        ("hf://datasets", "no name of a repository; write hf://datasets/ORG/NAME"),
    ],
)
def test_mistakes_are_one_line(server: Hub, tmp_path: Path, path: str, line: str) -> None:
    with pytest.raises(CorpusError) as caught:
        documents(tmp_path, path)
    assert str(caught.value).startswith("corpus.sources.0.path: ")
    assert str(caught.value).endswith(f"cannot be read ({line})")


def test_a_hub_that_does_not_respond_is_one_line(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        CorpusError, match=r"^corpus\.sources\.0\.path: .*\(the hub does not respond; go online, or name a "
    ):
        documents(tmp_path, NAME)
