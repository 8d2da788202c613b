"""Buckets, through a real S3 server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from s3_standin import s3_server
from small_run import small_config

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages import corpus


def article(number: int) -> str:
    return f"Article {number}. " + " ".join(f"word{number * i % 97}" for i in range(120))


DOCUMENTS = {f"wiki/{number:03}.txt": article(number) for number in range(40)}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server("text") as server:
        for key, text in DOCUMENTS.items():
            boto3.client("s3").put_object(Bucket="text", Key=key, Body=text.encode())
        yield server


OPTIONS = "?endpoint_override={endpoint}&scheme=http"


@pytest.mark.parametrize(
    "path",
    [
        "s3://text/wiki/*.txt",
        "s3://text/wiki",
        f"s3://text/wiki{OPTIONS}",
        f"s3://text/wiki/*.txt{OPTIONS}",
        f"s3://text/*/0[0-3]*.txt{OPTIONS}",
    ],
)
def test_a_bucket_is_a_source_like_a_folder(
    endpoint: str, tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if OPTIONS in path:
        monkeypatch.delenv("AWS_ENDPOINT_URL")  # the options alone name the server
    sources = [{"path": path.format(endpoint=endpoint), "name": "wiki", "format": "text", "documents": "file"}]
    config = small_config(
        tmp_path / "runs", corpus={"sources": sources, "validation_fraction": 0.1, "sequence_length": 64}
    )
    (tmp_path / "corpus").mkdir()
    summary = corpus.build(config, tmp_path / "corpus")
    assert summary["documents"] + summary["validation_documents"] == len(DOCUMENTS)


def test_a_bucket_that_is_not_there_is_one_clear_line(endpoint: str, tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "runs",
        corpus={
            "sources": [{"path": "s3://nowhere/wiki", "format": "text"}],
            "validation_fraction": 0.1,
            "sequence_length": 64,
        },
    )
    (tmp_path / "corpus").mkdir()
    with pytest.raises(CorpusError, match=r"corpus\.sources\.0\.path"):
        corpus.build(config, tmp_path / "corpus")
