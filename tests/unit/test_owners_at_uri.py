"""Data owners whose storages are in buckets, on machines that share nothing with each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from elsewhere import Elsewhere
from owned_text import OWNERS, found, owned_config, texts_of, traces
from pinned_runs import results
from s3_standin import s3_server

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.remote import Remote
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.text.tokenizer import Encoder

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

NO_SYNCS = {"sync_every": None}
"""Four members of a sync would wait for each other in two processes."""


@pytest.fixture
def at_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with s3_server("runs") as server:
        options = f"?endpoint_override={server}&scheme=http"
        storages = {name: f"s3://runs/of-{name}{options}" for name in OWNERS}
        yield owned_config(tmp_path, f"s3://runs/team{options}", storages, submodels=NO_SYNCS)


def copied(place: str, target: Path) -> Path:
    """All objects of a place, as files."""
    remote = Remote(place, "storage")
    for name in remote.list():
        remote.download(name, target / name)
    return target


def test_owners_buckets_hold_their_own_text_alone(at_uri: RunConfig, tmp_path: Path) -> None:
    with Elsewhere(tmp_path / "others") as backend:
        directory = pipeline.run(at_uri, backend=backend)
    RunStore.of(at_uri.location).fetch(
        directory / "model", directory / "report.json", directory / "corpus" / "tokenizer"
    )
    encoder = Encoder(directory / "corpus" / "tokenizer")
    own = {name: copied(owner.storage, tmp_path / "found" / name) for name, owner in at_uri.pools.owners.items()}
    # the driver's machine has neither
    others = [copied(str(at_uri.output), tmp_path / "found" / "run"), tmp_path / "cache"]
    for name in OWNERS:
        searched = list(traces(texts_of(at_uri, name), encoder))
        assert found(searched, [own[name]]) == [(True, True)] * len(searched)
        elsewhere = [*others, *(each for other, each in own.items() if other != name)]
        assert found(searched, elsewhere) == [(False, False)] * len(searched)
        assert not list(own[name].rglob("step-*"))
    undisturbed = pipeline.run(
        owned_config(
            tmp_path, tmp_path / "local", {name: str(tmp_path / f"local-{name}") for name in OWNERS}, submodels=NO_SYNCS
        ),
        backend=LocalBackend(),
    )
    assert results(directory)["weights"] == results(undisturbed)["weights"]
