"""Splits of data sets: which files belong to one, compared with Hugging Face `datasets`."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern, sanitize_patterns

from moedisco_ray.core.config import Source
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.splits import SplitError, files_of_split

LAYOUTS = [
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"),
    ("train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"),
    ("my-train-part.jsonl", "my-valid-part.jsonl", "extra.jsonl"),
    ("a.jsonl", "b/c.jsonl"),
    ("wiki_train_1.parquet", "wiki_test_1.parquet"),
    ("train.jsonl", "validation.jsonl", "eval.jsonl"),
]
CARD = """---
license: mit
configs:
- config_name: large
  data_files:
  - {split: train, path: large/*.jsonl}
- config_name: small
  default: true
  data_files:
  - {split: train, path: [small/a.jsonl, ./small/b.jsonl]}
  - {split: test, path: "small/t*.jsonl"}
---
# A data set
"""


def write(home: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text('{"text": "a"}\n')


def matching(pattern: str, folder: Path) -> list[str]:
    try:
        return list(resolve_pattern(pattern, str(folder)))
    except FileNotFoundError:  # another of the split's patterns matches
        return []


@pytest.mark.parametrize("names", LAYOUTS)
def test_splits_are_those_of_hugging_face_datasets(tmp_path: Path, names: tuple[str, ...]) -> None:
    write(tmp_path, names)
    patterns = sanitize_patterns(get_data_patterns(str(tmp_path)))
    for split, found in patterns.items():
        expected = {path for pattern in found for path in matching(pattern, tmp_path)}
        assert {str(tmp_path / name) for name in files_of_split(names, str(split), None, None)} == expected, split
    with pytest.raises(SplitError):
        files_of_split(names, "absent", None, None)


def test_an_empty_folder_has_no_split(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError):
        get_data_patterns(str(tmp_path))
    assert not files_of_split((), "train", None, None)


def test_the_card_names_the_files(tmp_path: Path) -> None:
    names = ("large/a.jsonl", "small/a.jsonl", "small/b.jsonl", "small/c.jsonl", "small/test.jsonl")
    write(tmp_path, names)
    (tmp_path / "README.md").write_text(CARD)

    def files(**settings: str) -> set[str]:
        return {
            Path(file.path).relative_to(tmp_path).as_posix()
            for file in list_files("corpus.sources.0", Source(path=str(tmp_path), **settings)).files
        }

    assert files(split="train") == {"small/a.jsonl", "small/b.jsonl"}
    assert files(split="test") == {"small/test.jsonl"}
    assert files(split="train", subset="large") == {"large/a.jsonl"}
    assert files() == set(names)
    refused = [
        ({"split": "dev"}, "has the splits train, test"),
        ({"split": "train", "subset": "huge"}, "has the subsets large, small"),
    ]
    for settings, message in refused:
        with pytest.raises(CorpusError, match=rf"corpus\.sources\.0\.split.*{message}"):
            files(**settings)


def test_a_broken_card_is_no_card() -> None:
    assert files_of_split(("train.jsonl",), "train", None, "---\n: [\n---\n") == {"train.jsonl"}
    with pytest.raises(SplitError, match="no subsets"):
        files_of_split(("train.jsonl",), "train", "a", None)
