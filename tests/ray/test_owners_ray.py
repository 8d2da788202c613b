"""Text of two data owners on Ray: only nodes with an owner's tag can open its text; the results are the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from damaged_runs import flip_bit
from owned_text import OWNERS, found, owned_config, texts_of, traces
from pinned_runs import results
from ray.cluster_utils import Cluster

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.store.read_roots import ENVIRONMENT, ReadRoots
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.text.tokenizer import Encoder

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]


def readable(config: RunConfig, owner: str | None) -> str:
    """The read roots of a machine: the text of an owner, and as its own the run, and the owner's storage."""
    storage = [] if owner is None else [config.pools.owners[owner].storage]
    texts = [source.path for source in config.corpus.of_owner(owner).values()]
    return ReadRoots(texts, own=[str(config.directory), *storage]).to_json()


def test_only_an_owners_nodes_open_its_text(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = pipeline.run(
        owned_config(tmp_path, tmp_path / "local-runs", {name: str(tmp_path / f"local-{name}") for name in OWNERS}),
        backend=LocalBackend(),
    )
    config = owned_config(tmp_path)
    monkeypatch.setenv(ENVIRONMENT, readable(config, None))
    nodes: dict[str | None, str] = {}
    for owner in (None, *OWNERS):
        tags = {"low_mem_gpu": 1, "high_mem_gpu": 1} if owner is None else {config.pools.owners[owner].resource: 1}
        nodes[owner] = cluster.add_node(
            num_cpus=2 if owner is None else 0,
            resources=tags,
            object_store_memory=80_000_000,
            env_vars={ENVIRONMENT: readable(config, owner)},
        ).node_id

    directory = pipeline.run(config)

    assert results(directory) == results(undisturbed)
    events = EventLog.read(directory / "events.jsonl")
    started = {event.unit: event.data["node_id"] for event in events if event.type == "unit_started"}
    for k in range(config.clusters.count):
        assert started[f"submodel-{k}"] == nodes[config.owner_of(k)]
    encoder = Encoder(directory / "corpus" / "tokenizer")
    for owner in OWNERS:
        own, others = (
            Path(config.pools.owners[owner].storage),
            [tmp_path / each for each in ("runs", *OWNERS) if each != owner],
        )
        searched = list(traces(texts_of(config, owner), encoder))
        assert found(searched, [own]) == [(True, True)] * len(searched)
        assert found(searched, others) == [(False, False)] * len(searched)
        assert list(own.rglob("submodel-*.0.log"))
    assert not list((directory / "logs").glob("submodel-[23]*"))
    _check_repair(config, directory)


def _check_repair(config: RunConfig, directory: Path) -> None:
    """Damage an owner's corpus, which this process may not read; the owner's node makes it again."""
    [corpus] = Path(config.pools.owners["alice"].storage).glob("*/corpus")
    shard = min(corpus.glob("shards/*.npy"))
    intact, undisturbed = shard.read_bytes(), results(directory)
    flip_bit(shard)
    events: list[Event] = []
    pipeline.run(config, (events.append,), repairs=True)
    assert (
        f"damaged: shards/{shard.name} of stage corpus, in the storage of data owner alice; the stage is made again"
        in [event.data["message"] for event in events if event.type == "warning"]
    )
    assert [event.stage for event in events if event.type == "stage_started"] == ["corpus"]
    assert shard.read_bytes() == intact
    assert results(directory) == undisturbed
