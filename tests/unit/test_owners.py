"""Text of data owners: it stays in its owner's storage, and only weights and figures come to the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from damaged_runs import Finished, shared_run
from owned_text import OWNERS, found, owned_config, texts_of, traces
from pinned_runs import SIZES, results
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError, CorpusError, RunError, RunStopped, StorageError
from moedisco_ray.core.records.bill import line
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.stages import fingerprints
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.corpus import input_identity, probe
from moedisco_ray.stages.corpus import owned as owned_corpus
from moedisco_ray.stages.scoring import perplexity
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.validation import load_documents, validation_parts
from service.domain.policies import Policy
from service.domain.quotas import check_pools, priced
from service.errors import AgainstPolicy

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def made() -> Iterator[Finished]:
    with shared_run(owned_config) as found:
        found.restore()
        yield found


@pytest.fixture(scope="module")
def config(made: Finished) -> RunConfig:
    return made.config


@pytest.fixture(scope="module")
def finished(made: Finished) -> Path:
    return made.directory


@pytest.mark.parametrize("owner", OWNERS)
def test_an_owners_text_and_tokens_are_in_its_own_storage_alone(config: RunConfig, finished: Path, owner: str) -> None:
    encoder = Encoder(finished / "corpus" / "tokenizer")
    searched = list(traces(texts_of(config, owner), encoder))
    assert found(searched, [Path(config.pools.owners[owner].storage)]) == [(True, True)] * len(searched)
    others = [finished, *(Path(other.storage) for name, other in config.pools.owners.items() if name != owner)]
    assert found(searched, others) == [(False, False)] * len(searched)


def test_text_without_an_owner_is_found_in_the_run_directory(config: RunConfig, finished: Path) -> None:
    encoder = Encoder(finished / "corpus" / "tokenizer")
    searched = list(traces(texts_of(config, None), encoder))
    assert found(searched, [finished]) == [(True, True)] * len(searched)


def test_the_report_names_what_left_each_owner_with_its_size(config: RunConfig, finished: Path) -> None:
    report = current_report(finished)
    for k, owner in enumerate(OWNERS, start=config.shared_clusters):
        left = {each.what: each.bytes for each in report.left if each.owner == owner}
        files = {
            path.name: path.stat().st_size for path in (finished / "submodels" / str(k)).iterdir() if path.is_file()
        }
        assert {f"submodel-{k}/{name}": size for name, size in files.items()}.items() <= left.items()
        assert not [name for name in files if "optimizer" in name]
        layers, hidden = SIZES["num_hidden_layers"], SIZES["hidden_size"]
        assert left[f"mean inputs of {layers} routers"] == 4 * layers * hidden
        assert 0 < left["numbers of documents, tokens and bytes"] < 100
        backbones = {what: size for what, size in left.items() if "backbone at sync point" in what}
        assert len(backbones) == len(report.syncs) > 0
        assert min(backbones.values()) > 10_000
        assert 0 < left["losses on held-out text"] < 1000
        assert len(left) == len(files) + len(backbones) + 4
    assert report.corpus.sources.keys() == {"public"}
    assert report.corpus.owners.keys() == set(OWNERS)
    shown = CliRunner().invoke(app, ["show", str(finished)]).output
    assert "What left the data owners' storages" in shown
    assert "submodel-2/model.safetensors" in shown
    assert "alice's text, with the owner's sub-model" in shown


@pytest.mark.parametrize("owner", OWNERS)
def test_each_owners_held_out_text_is_measured(config: RunConfig, finished: Path, owner: str) -> None:
    report = current_report(finished)
    k, figures = config.shared_clusters + config.owners.index(owner), report.evaluation.owners[owner]
    [corpus] = (path.parent for path in Path(config.pools.owners[owner].storage).rglob("corpus/manifest.json"))
    documents = load_documents(validation_parts(corpus), config.evaluation.max_tokens)
    model = AutoModelForCausalLM.from_pretrained(finished / "submodels" / str(k)).eval()
    limits = Limits(config.corpus.sequence_length, config.corpus.document_tokens)
    expected = perplexity(
        model,
        documents,
        prefix=Encoder(finished / "corpus" / "tokenizer").prefix,
        sequence_length=limits.sequence_tokens,
    )
    assert figures.tokens == figures.stages["submodels"].tokens == sum(map(len, documents.tokens)) > 0
    assert figures.stages["submodels"].loss == pytest.approx(expected.loss, rel=1e-5)
    assert figures.stages.keys() == {"seed", "submodels", "merge"}
    assert figures.stages["submodels"].loss < figures.stages["seed"].loss  # the sub-model has learned the owner's text


def test_the_bill_has_the_price_of_the_owners_machines(tmp_path: Path) -> None:
    free = {
        "alice": {"storage": "a", "resource": "alice_gpu", "price_per_hour": 0},
        "bob": {"storage": "b", "resource": "bob_gpu"},
    }
    config = owned_config(tmp_path, pools={"owners": free, "low_memory": {"price_per_hour": 0.5}})
    prices = {key: pool.price_per_hour for key, pool in config.pools.by_key.items()}
    assert prices["owners.alice"] == 0
    assert prices["owners.bob"] == prices["low_memory"] == 0.5
    assert line("submodels", "owners.alice", 3600, config).dollars == 0
    changed, notes = priced(config, {"alice_gpu": 0.25, "low_mem_gpu": 0.5})
    assert changed.pools.by_key["owners.alice"].price_per_hour == 0.25
    assert "pools.owners.alice.price_per_hour: the operator's price of alice_gpu, $0.25 an hour, replaces 0" in notes


def test_a_price_of_zero_is_no_way_around_a_limit_on_dollars(tmp_path: Path) -> None:
    free = {name: {"storage": name, "resource": f"{name}_gpu", "price_per_hour": 0} for name in OWNERS}
    limited = Policy(dollars_per_month=5, prices={"low_mem_gpu": 1, "high_mem_gpu": 2, "bob_gpu": 1})
    with pytest.raises(
        AgainstPolicy, match=r"config\.pools\.owners\.alice\.resource: 'alice_gpu': has no operator price"
    ):
        check_pools(owned_config(tmp_path, pools={"owners": free}), limited)


KILLED = """
import os, signal, sys
from owned_text import owned_config
from pathlib import Path
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

def listen(event):
    steps_of_unit = (event.type, event.stage, event.unit) == ("progress", "submodels", sys.argv[2])
    if steps_of_unit and event.data["step"] >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

pipeline.run(owned_config(Path(sys.argv[1])), (listen,), backend=LocalBackend())
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_an_owners_text_in_its_own_storage_alone(tmp_path: Path) -> None:
    """In the second owner's training, after a sync point: both owners' text has been read."""
    config, temporary = owned_config(tmp_path), tmp_path / "temporary"
    temporary.mkdir()
    here = str(Path(__file__).parent)
    search = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")]), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "submodel-3", "11"],
        env=os.environ | {"PYTHONPATH": search, "TMPDIR": str(temporary)},
        check=False,
        timeout=240,
    )
    assert killed.returncode == -signal.SIGKILL
    encoder = Encoder(config.directory / "corpus" / "tokenizer")
    for owner in OWNERS:
        searched = list(traces(texts_of(config, owner), encoder))
        others = (Path(other.storage) for name, other in config.pools.owners.items() if name != owner)
        assert found(searched, [config.directory, temporary, *others]) == [(False, False)] * len(searched)
        assert found(searched, [Path(config.pools.owners[owner].storage)]) == [(True, True)] * len(searched)


def test_an_owners_cluster_is_its_own_and_gets_its_part_of_the_tokens(config: RunConfig, finished: Path) -> None:
    report = current_report(finished)
    entries = report.clusters.clusters
    assert [entry.owner for entry in entries] == [None, None, *OWNERS]
    assert not [term for entry in entries if entry.owner for term in (*entry.terms, *entry.examples)]
    owned = sum(text.tokens for text in report.corpus.owners.values())
    trained = read_manifest(finished / "submodels")
    assert trained is not None
    tokens = [unit["tokens"] for unit in trained.summary["units"]]
    assert sum(tokens[2:]) / sum(tokens) == pytest.approx(owned / (owned + report.corpus.tokens), abs=0.05)


@pytest.mark.slow
def test_a_stopped_run_gives_the_same_bits(config: RunConfig, finished: Path, tmp_path: Path) -> None:
    again = config.model_copy(
        update={
            "output": tmp_path / "runs",
            "pools": config.pools.model_copy(
                update={
                    "owners": {
                        name: owner.model_copy(update={"storage": str(tmp_path / name)})
                        for name, owner in config.pools.owners.items()
                    }
                }
            ),
        }
    )
    for number, (unit, step) in enumerate([("seed", 10), ("submodel-2", 10), ("submodel-3", 15)]):
        stop = StopFile(tmp_path / f"stop-{number}")

        def listen(event: Event, unit: str = unit, step: int = step, stop: StopFile = stop) -> None:
            if event.type == "progress" and event.unit == unit and event.data["step"] >= step:
                stop.request("cancelled")

        with pytest.raises(RunStopped):
            pipeline.run(again, (listen,), backend=LocalBackend(), stop=stop)
    assert list((tmp_path / "bob").rglob("step-*"))
    assert not list((tmp_path / "runs").rglob("owned-submodel-[23]/steps/step-*"))
    directory = pipeline.run(again, backend=LocalBackend())
    assert results(directory) == results(finished)
    assert not [path for name in OWNERS for path in (tmp_path / name).rglob("step-*")]


def owners(alice: tuple[str, str] = ("a", "x"), bob: tuple[str, str] = ("b", "y")) -> dict[str, Any]:
    return {
        "owners": {
            name: dict(zip(("storage", "resource"), each, strict=True))
            for name, each in (("alice", alice), ("bob", bob))
        }
    }


SECRET = "the secret recipe"


def test_an_unreadable_text_is_explained_in_its_owners_storage_alone(tmp_path: Path) -> None:
    config = owned_config(tmp_path)
    Path(config.corpus.sources[1].path).write_text(f'{{"text": "{SECRET}\n')
    with pytest.raises(CorpusError, match=r"pools.owners.alice: .*corpus.log says why") as caught:
        pipeline.run(config, backend=LocalBackend())
    assert caught.value.__cause__ is None
    [log] = (tmp_path / "alice").rglob("corpus.log")
    assert "domain1.jsonl" in log.read_text()
    assert "domain1.jsonl" not in (config.directory / "events.jsonl").read_text()


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, SECRET),
        KeyError(SECRET),
        TypeError(SECRET),
        pa.ArrowNotImplementedError(SECRET),
        RuntimeError(SECRET),
    ],
)
@pytest.mark.parametrize("full", [False, True])
def test_no_error_carries_an_owners_text_out_of_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, full: bool
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(owned_corpus, "build", fails)
    if full:
        monkeypatch.setattr(owned_corpus, "write_text", lambda *_: (tmp_path / "none" / "corpus.log").write_text(""))
    with pytest.raises((RunError, OSError)) as caught:
        owned_corpus.build_owned(
            owned_config(tmp_path),
            "alice",
            location=tmp_path / "alice",
            tokenizer=tmp_path / "tokenizer",
            fingerprint="f",
        )
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    if not full:
        assert str(caught.value).endswith("alice/logs/corpus.log says why")
        [log] = (tmp_path / "alice").rglob("corpus.log")
        assert SECRET in log.read_text()


def test_a_storage_that_does_not_answer_is_named_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise StorageError("s3://alice does not answer")

    monkeypatch.setattr(owned_corpus, "build", fails)
    with pytest.raises(StorageError, match="s3://alice does not answer"):
        owned_corpus.build_owned(
            owned_config(tmp_path),
            "alice",
            location=tmp_path / "alice",
            tokenizer=tmp_path / "tokenizer",
            fingerprint="f",
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"corpus": {"sources": [{"path": "embedded"}, {"path": "x", "owner": "carol"}]}},
            "corpus.sources.1.owner: 'carol' is not in",
        ),
        (
            {"corpus": {"sources": [{"path": "embedded"}, {"path": "x", "owner": "bob"}]}},
            "pools.owners.alice: has no text",
        ),
        (
            {"corpus": {"sources": [{"path": "x", "owner": "bob"}, {"path": "y", "owner": "alice"}]}},
            "corpus.sources: all have an owner",
        ),
        ({"evaluation": {"sources": [{"path": "z", "owner": "bob"}]}}, "evaluation.sources.0.owner: no such setting"),
        ({"clusters": {"count": 2}}, "clusters.count: 2 leaves no cluster"),
        ({"submodels": {"quorum": 3}}, "submodels.quorum: 3 needs the checkpoints"),
        ({"finetune": {"keep_optimizer_state": True}}, "finetune.keep_optimizer_state: needs the optimizer states"),
        ({"export": {"keep_apart": "always"}}, "export.keep_apart: 'always' is impossible: the run has"),
        ({"tokens": {"seed_share": 0.2, "finetune_share": 0.8}}, "pools.owners: need sub-models"),
        (
            {"pools": {"low_memory": {"resource": "bob_gpu"}}},
            "pools.owners.bob.resource: 'bob_gpu' is also a resource of pools.low_memory",
        ),
        (
            {"pools": owners(("a", "same"), ("b", "same"))},
            "pools.owners.bob.resource: 'same' is also a resource of pools.owners.alice",
        ),
        (
            {"pools": owners(("a", "x"), ("a/b", "y"))},
            "pools.owners.alice.storage: 'a' overlaps with pools.owners.bob.storage 'a/b'",
        ),
        (
            {"pools": owners(("s3://a/b?region=x", "x"), ("s3://a", "y"))},
            "pools.owners.alice.storage: 's3://a/b?region=x' overlaps with pools.owners.bob.storage 's3://a'",
        ),
        (
            {"checkpoint": {"storage": "a"}, "pools": owners()},
            "pools.owners.alice.storage: 'a' overlaps with checkpoint.storage 'a'",
        ),
        ({"pools": {"owners": {"a b": {"storage": "a", "resource": "x"}}}}, "pools.owners.a b"),
        ({"pools": owners(("ftp://a", "x"))}, "pools.owners.alice.storage: 'ftp://a': names no storage"),
        ({"pools": owners(("a", "GPU"))}, "pools.owners.alice.resource: 'GPU': GPU is one of Ray's"),
    ],
)
def test_a_mistake_is_one_line_with_setting_and_remedy(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        owned_config(tmp_path, **changes)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


def test_an_owners_files_are_not_looked_at_before_its_node_reads_them(tmp_path: Path) -> None:
    config = owned_config(tmp_path)
    before = fingerprints(config, input_identity(config))
    for name in OWNERS:
        Path(next(iter(config.corpus.of_owner(name).values())).path).unlink()
    assert not probe(config).problems
    assert fingerprints(owned_config(tmp_path), input_identity(config)) == before
    moved = {name: owner.model_copy(update={"storage": "elsewhere"}) for name, owner in config.pools.owners.items()}
    other = config.model_copy(update={"pools": config.pools.model_copy(update={"owners": moved})})
    assert fingerprints(other, input_identity(other))["corpus"] != before["corpus"]
