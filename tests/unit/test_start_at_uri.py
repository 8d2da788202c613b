"""The model of a run on an S3 server: other runs start from it, on machines that share nothing, and it is evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from elsewhere import Elsewhere
from pinned_runs import config_of, results
from s3_standin import s3_server
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.store.locations import CACHE, cache_directory, is_uri, joined
from moedisco_ray.core.store.run_models import local_model
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home: Path) -> Iterator[RunConfig]:
    """A finished run at a URI, without a working copy on this machine."""
    with s3_server("starts") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE, str(home / "cache"))
        output = f"s3://starts/team?endpoint_override={server}&scheme=http"
        config = config_of("qwen3_moe", home)
        few = config.tokens.model_copy(update={"total": 15_000})
        config = config.model_copy(update={"output": output, "tokens": few})
        pipeline.run(config, backend=LocalBackend())
        shutil.rmtree(cache_directory())
        yield config


def starting_from(first: RunConfig, model: str, output: str) -> RunConfig:
    raw = first.model_dump(mode="json") | {"name": "second", "output": output, "seed": 1}
    raw["model"] = {"family": first.model.family, "init": {"checkpoint": model}}
    raw["tokens"] |= {"seed_share": 0.0}
    raw["clusters"] |= {"vectors": "tfidf_svd"}
    return check_config(raw)


def test_a_model_at_a_uri_is_a_start_like_a_directory(
    first: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore.of(first.location)
    store.fetch(store.directory / "model")
    shutil.copytree(store.directory / "model", tmp_path / "model")
    expected = results(
        pipeline.run(starting_from(first, str(tmp_path / "model"), str(tmp_path / "runs")), backend=LocalBackend())
    )

    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    place = str(joined(first.location, "model"))
    config = starting_from(first, place, str(first.output))
    with Elsewhere(tmp_path / "others") as backend:
        directory = pipeline.run(config, backend=backend)
    here = RunStore.of(first.location).directory / "model"
    assert (here / "config.json").is_file()
    assert not list(here.glob("*.safetensors")), "the driver reads no weights"
    assert [path.name for path in here.parent.iterdir()] == ["model"]
    RunStore.of(config.location).fetch(directory / "model", directory / "report.json")
    assert results(directory) | {"losses": 0} == expected | {"losses": 0}
    assert json.loads((directory / "report.json").read_text())["start"] == {"kind": "checkpoint", "name": first.name}


def test_a_model_at_a_uri_is_evaluated(first: RunConfig, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc def " * 300)
    done = CliRunner().invoke(app, ["evaluate", str(joined(first.location, "model")), "--sources", str(text), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["unseen"]["perplexity"] > 1


@pytest.mark.parametrize("name", ["qwen3_moe/corpus", "other/model", "qwen3_moe"])
def test_a_uri_without_a_model_is_one_clear_line(first: RunConfig, name: str) -> None:
    place = str(joined(str(first.output), *name.split("/")))
    assert is_uri(place)
    with pytest.raises(
        CheckpointError, match=r"model\.init\.checkpoint: .*holds no model of a finished run; name OUTPUT/NAME"
    ):
        starting_from(first, place, str(first.output))
    with pytest.raises(CheckpointError, match=r"tokenizer\.path"):
        local_model("tokenizer.path", place)
