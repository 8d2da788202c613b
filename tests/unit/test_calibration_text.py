"""The text that routers are calibrated on, if some of it counts twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import DOMAINS, small_config

from moedisco_ray.core.config import RunConfig
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.calibration_text import calibration
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.text.tokenizer import Encoder

LENGTH = 64


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_config(
        tmp_path_factory.mktemp("calibration"),
        tokens={"total": 24_000, "seed_share": 0.0, "finetune_share": 0.4},
        clusters={"count": 2, "vectors": "mean_token"},
        corpus={
            "sources": [
                {
                    "path": f"{Path(str(module.__file__)).parent}/*.py",
                    "name": name,
                    "documents": "paragraph",
                    "format": "text",
                    "weight": 2.0 if name == "asyncio" else 1.0,
                }
                for name, module in DOMAINS.items()
            ]
        },
    )
    pipeline.run(config, backend=LocalBackend())
    return config


def table_of(directory: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(directory.glob("*.parquet"))])


def own_windows(config: RunConfig, cluster: int) -> list[list[int]]:
    """A cluster's own text in windows, each with its next token: documents once, then again those that count twice."""
    assigned = table_of(config.directory / "clusters" / "assignments")
    documents = table_of(config.directory / "corpus" / "train").slice(0, len(assigned))
    own = documents.filter(pa.array(assigned["cluster"].to_numpy() == cluster)).to_pylist()
    eos = Encoder(config.directory / "corpus" / "tokenizer").eos
    stream = [token for copy in (1, 2) for row in own if row["copies"] >= copy for token in (*row["tokens"], eos)]
    return [stream[at : at + LENGTH + 1] for at in range(0, len(stream) - LENGTH, LENGTH)]


@pytest.mark.slow
def test_a_router_learns_a_cluster_from_its_own_text(config: RunConfig) -> None:
    batches = calibration(Context(config, config.directory, "0" * 64, lambda _: None, LocalBackend()))
    for cluster in range(2):
        own = [tuple(window[:-1]) for window in own_windows(config, cluster)]
        rows = [tuple(row) for tokens_BL, cluster_B in batches if cluster_B[0] == cluster for row in tokens_BL.tolist()]
        assert len(rows) > 10
        assert (rows[0], rows[-1]) == (own[0], own[-1])  # spread over all of it
        assert set(rows) <= set(own)


@pytest.mark.slow
def test_a_clusters_text_is_its_own(config: RunConfig) -> None:
    for cluster in range(2):
        shard = TokenStream([config.directory / "clusters" / "shards" / str(cluster)], LENGTH)
        own = own_windows(config, cluster)
        np.testing.assert_array_equal(np.stack([shard.window(i) for i in range(len(shard))]), np.array(own))
