"""Seven plain text files through the command line, as a newcomer would train on them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from moedisco_ray.cli.app import app
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.corpus import embedded

SHARED = Path(__file__).resolve().parents[3] / "shared" / "corpora" / "small8" / "train"
SMALL = (
    "tokens.total=140_000",
    "tokenizer.train_vocab_size=1000",
    "model.config.hidden_size=32",
    "model.config.moe_intermediate_size=64",
    "evaluation.max_tokens=5000",
)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Seven files of about 360 kB: of the shared corpora where they are there, or else of the embedded corpus."""
    if SHARED.is_dir():
        return sorted(SHARED.glob("*.txt"))[:7]
    paths = []
    for name in list(embedded.DOMAINS)[:7]:
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text("\n\n".join(embedded.domain_texts(name, 360_000)), encoding="utf-8")
    return paths


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline, but with its work done in this process."""
    monkeypatch.setattr(pipeline, "run", functools.partial(pipeline.run, backend=LocalBackend()))


def moedisco(*words: str) -> Result:
    result = CliRunner().invoke(app, list(words), prog_name="moedisco")
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_seven_text_files_give_every_domain_both_splits_and_every_cluster_documents(
    tmp_path: Path, files: list[Path], without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    moedisco("init", "my.yaml", "--preset", "demo")
    sources = json.dumps([{"path": str(path), "name": path.stem} for path in files])
    settings = [word for setting in (f"corpus.sources={sources}", *SMALL) for word in ("--set", setting)]
    assert moedisco("validate", "my.yaml", *settings).stdout.startswith("ok: demo")
    moedisco("run", "my.yaml", *settings)

    report = json.loads(moedisco("show", "runs/demo", "--json").stdout)
    domains = report["corpus"]["sources"]
    assert list(domains) == [path.stem for path in files]
    for name, domain in domains.items():
        assert domain["documents"] > 100, name
        assert domain["validation_documents"] > 0, name
    share = report["corpus"]["validation_documents"] / (
        report["corpus"]["documents"] + report["corpus"]["validation_documents"]
    )
    assert 0.03 < share < 0.07  # 0.05 in the preset
    assert all(cluster["documents"] > 30 for cluster in report["clusters"]["clusters"])
    assert report["clusters"]["warnings"] == []
    assert report["evaluation"]["tokens"] <= 5000
    assert "all" in moedisco("show", "runs/demo").stdout
