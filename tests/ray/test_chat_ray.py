"""Conversations, token ids and plain text on Ray: the same masks, weights and losses as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import same_outcome
from test_chat_run import config_of, sources, write_sources

from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.usefixtures("ray_cluster")
def test_ray_trains_on_the_answers_alone_as_one_process_does(tmp_path: Path) -> None:
    text = sources(write_sources(tmp_path))
    plain = pipeline.run(config_of(tmp_path / "plain", text, tokenizer=tmp_path), backend=LocalBackend())
    found = pipeline.run(config_of(tmp_path / "ray", text, tokenizer=tmp_path))
    parts = sorted((plain / "corpus").rglob("*.parquet"))
    assert parts
    for part in parts:
        assert (found / part.relative_to(plain)).read_bytes() == part.read_bytes(), part
    same_outcome(found, plain)
