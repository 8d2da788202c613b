"""A finished run's model and text, as a service hands them to the next run's driver, without Ray."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from small_run import OneCorpus, small_config

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.core.store.read_roots import ENVIRONMENT, ReadRoots
from moedisco_ray.execution import pipeline
from service.domain.starts import located

TOKENS = {"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4}


def documents(directory: Path) -> set[str]:
    return {
        text for path in (directory / "corpus").glob("*/*.parquet") for text in pq.read_table(path)["text"].to_pylist()
    }


@pytest.mark.slow
def test_a_finished_runs_model_and_text_are_the_next_runs_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = small_config(tmp_path / "runs" / "ID", tokens=TOKENS)
    directory = pipeline.run(first, backend=OneCorpus())
    raw = small_config(tmp_path / "runs" / "NEXT", tokens=TOKENS).model_dump(mode="json")
    raw["clusters"]["vectors"] = "hidden_state"
    raw["submodels"]["start_loss"] = None  # one of two experts is half of the model
    raw["model"] = {"family": first.model.family, "init": {"checkpoint": "run://ID/model"}}
    raw["corpus"]["sources"] = [{"path": "run://ID/corpus"}]
    config, read = located(RunConfig.model_validate(raw), {"ID": directory}.get, str)
    assert read == (directory / "corpus", directory / "model")
    monkeypatch.setenv(ENVIRONMENT, ReadRoots(own=[*read, tmp_path / "runs" / "NEXT"]).to_json())
    after = pipeline.run(config, backend=OneCorpus())
    assert documents(after) == documents(directory)
    assert read_json(after / "model" / "config.json")["hidden_size"] == first.model.architecture.hidden_size
