"""The text that routers are calibrated on and merges compared on, where clusters overlap and some of it counts twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from small_run import DOMAINS, small_config

from moedisco_ray.core.artifacts import read_json, read_manifest
from moedisco_ray.core.config import RunConfig
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.context import Context, submodel_seed
from moedisco_ray.stages.merge.calibration_text import calibration
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.training.packed_tokens import TokenStream, batch_indices

LENGTH = 64
Window = tuple[int, ...]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_config(
        tmp_path_factory.mktemp("calibration"), tokens={"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4},
        clusters={"count": 2, "vectors": "mean_token", "overlap": 0.3}, merge={"backbone": "auto", "auto_tokens": 1024},
        corpus={"sources": [
            {"path": f"{Path(str(module.__file__)).parent}/*.py", "name": name, "documents": "paragraph", "format": "text",
             "weight": 2.0 if name == "asyncio" else 1.0} for name, module in DOMAINS.items()]})
    pipeline.run(config, backend=LocalBackend())
    return config


@pytest.fixture(scope="module")
def chosen(config: RunConfig) -> tuple[list[tuple[NDArray[Any], NDArray[Any]]], list[Window]]:
    batches, held_out = calibration(Context(config, config.directory, "0" * 64, lambda _: None, LocalBackend()))
    return batches, [tuple(window.tolist()) for window in held_out]


def table_of(directory: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(directory.glob("*.parquet"))])


def own_windows(config: RunConfig, cluster: int) -> list[list[int]]:
    """A cluster's own text in windows, each with the token after it: its documents once, then again those that count twice."""
    assigned = table_of(config.directory / "clusters" / "assignments")
    documents = table_of(config.directory / "corpus" / "train").slice(0, len(assigned))
    own = documents.filter(pa.array(assigned["cluster"].to_numpy() == cluster)).to_pylist()
    eos = Encoder(config.directory / "corpus" / "tokenizer").eos
    stream = [token for copy in (1, 2) for row in own if row["copies"] >= copy for token in (*row["tokens"], eos)]
    return [stream[at:at + LENGTH + 1] for at in range(0, len(stream) - LENGTH, LENGTH)]


@pytest.mark.parametrize("cluster", [0, 1])
def test_a_router_learns_a_cluster_from_its_own_text(config: RunConfig, chosen: Any, cluster: int) -> None:
    batches, _ = chosen
    own = {tuple(window[:-1]) for window in own_windows(config, cluster)}
    rows = [tuple(row) for tokens_BL, cluster_B in batches if cluster_B[0] == cluster for row in tokens_BL.tolist()]
    assert len(rows) > 10
    assert set(rows) <= own
    # There is other text that it trains on.
    assert read_json(config.directory / "clusters" / "report.json")["shard_tokens"][cluster] > 1.1 * LENGTH * len(own)


def test_merges_are_compared_on_own_text_that_no_router_and_not_its_sub_model_saw(config: RunConfig, chosen: Any) -> None:
    batches, held_out = chosen
    calibrated = {tuple(row[1:]) for tokens_BL, _ in batches for row in tokens_BL.tolist()}
    manifest = read_manifest(config.directory / "submodels")
    assert manifest is not None
    found = 0
    for cluster, unit in enumerate(manifest.summary["units"]):
        mine = {tuple(window[1:]) for window in own_windows(config, cluster)} & set(held_out)
        shard = TokenStream([config.directory / "clusters" / "shards" / str(cluster)], LENGTH)
        trained = batch_indices(submodel_seed(config, cluster), 0, unit["tokens"] // LENGTH, len(shard))
        assert len(set(trained)) == len(trained), "it went through all of its text, so that nothing is tested"
        assert not mine & {tuple(shard.window(int(i))[1:].tolist()) for i in trained}
        found += len(mine)
    assert found == len(held_out) == len(set(held_out)) >= 1024 // LENGTH
    assert not {window[:-1] for window in held_out} & calibrated


def test_a_clusters_text_begins_with_its_own(config: RunConfig) -> None:
    for cluster in range(2):
        shard = TokenStream([config.directory / "clusters" / "shards" / str(cluster)], LENGTH)
        own = own_windows(config, cluster)
        np.testing.assert_array_equal(np.stack([shard.window(i) for i in range(len(own))]), np.array(own))
