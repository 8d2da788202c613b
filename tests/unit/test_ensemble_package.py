"""`moedisco export --to ensemble`: the sub-models as one model of transformers, which needs none of our code."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from changed_files import accept_as_input
from hub_standin import hub
from huggingface_hub import ModelCard
from other_environments import VLLM
from s3_standin import s3_server
from small_run import DOMAINS, small_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from docs.ecosystem import VERSION
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.export_summary import ExportSummary, ModelFacts
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.records.summaries import EvaluationRecord
from moedisco_ray.core.store.locations import CACHE, cache_directory
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import check_same, open_checkpoint, specialise
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.clustering import ClusterModel
from moedisco_ray.stages.clustering.vectors.hidden_state import HiddenState
from moedisco_ray.stages.clustering.vectors.mean_token import MeanToken
from moedisco_ray.stages.evaluate.ensemble import ensemble_nats
from moedisco_ray.stages.export.card import ensemble_card
from moedisco_ray.stages.export.modeling_ensemble import EnsembleForCausalLM
from moedisco_ray.stages.scoring import token_nats
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.validation import Documents, load_documents, validation_parts

LENGTH, MOST_TOKENS = 256, 4_000
ALONE = """
import json, sys
sys.modules["moedisco_ray"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([json.loads(sys.argv[2])])
with torch.no_grad():
    loss = model(ids, labels=ids).loss.item()
made = model.generate(ids[:, :70], max_new_tokens=8, do_sample=False)[0].tolist()
print(json.dumps({"loss": loss, "made": made, "ids": tokenizer("def f(x):")["input_ids"]}))
"""


def config_at(home: Path, **changes: Any) -> RunConfig:
    """A run whose documents are at most one training sequence, of four blocks."""
    sources = [
        {"path": f"{Path(str(module.__file__)).parent}/*.py", "name": name, "format": "text"}
        for name, module in DOMAINS.items()
    ]
    return small_config(
        home / "runs",
        **{
            "corpus": {"sources": sources, "sequence_length": LENGTH, "max_document_tokens": LENGTH},
            "tokens": {"total": 40_000, "seed_share": 0.0, "finetune_share": 0.1},
            "evaluation": {"max_tokens": MOST_TOKENS},
            "export": {"keep_apart": "always"},
            **changes,
        },
    )


def export(run: Path | str, target: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["export", str(run), "--to", "ensemble", "--output", str(target), *options])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(config_at(tmp_path_factory.mktemp("run")), backend=LocalBackend())


@pytest.fixture(scope="module")
def package(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("package") / "ensemble"
    code, output = export(run, target)
    assert code == 0, output
    assert output.startswith(f"wrote {target}: ")
    return target


@pytest.fixture(scope="module")
def model(package: Path) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_pretrained(package)


@pytest.fixture(scope="module")
def documents(run: Path) -> Documents:
    return load_documents(validation_parts(run / "corpus"), MOST_TOKENS)


@pytest.fixture(scope="module")
def text(run: Path, documents: Documents) -> list[int]:
    """The longest document, after the token that precedes it in training."""
    return [Encoder(run / "corpus" / "tokenizer").prefix, *max(documents.tokens, key=len).tolist()]


def run_with(kind: str, run: Path, documents: Documents, home: Path) -> Path:
    """The run with a cluster model of another kind, whose centres are the vectors of two documents."""
    copied = Path(shutil.copytree(run, home / kind))
    if kind != "tfidf_svd":
        source, directory = copied / "submodels" / "0", copied / "clusters" / "cluster_model"
        # Random embeddings are so near to each other that distances would hardly matter.
        vectors = (
            HiddenState(source, 100) if kind == "hidden_state" else MeanToken(20 * MeanToken.of_model(source)._table_VD)
        )
        vectors.centre(vectors.embed(documents.texts[:8], documents.tokens[:8]))
        centroids = vectors.transform(documents.texts[:2], documents.tokens[:2]).astype(np.float64)
        shutil.rmtree(directory)
        ClusterModel(vectors, centroids, np.zeros(2)).save(directory)
        accept_as_input(copied / "clusters")
    return copied


def loaded_alone(
    name: str, text: list[int], home: Path, python: Path = Path(sys.executable), **environment: str
) -> dict[str, Any]:
    """What transformers computes with a package in a process that has no package of ours; see `ALONE`."""
    done = subprocess.run(
        [python, "-I", "-c", ALONE, name, json.dumps(text)],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env={**os.environ, "HF_MODULES_CACHE": str(home / "modules"), **environment},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(run: Path, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Nats of some tokens of a document, as the evaluate stage computes an ensemble's."""
    encoder, clusters = Encoder(run / "corpus" / "tokenizer"), ClusterModel.load(run / "clusters" / "cluster_model")
    count = len(positions)
    each = Documents(
        (b"",) * count,
        ("",) * count,
        ("",) * count,
        (tokens,) * count,
        tuple(np.eye(len(tokens), dtype=np.bool_)[positions]),
    )

    def nats() -> Iterator[list[np.ndarray]]:
        for k in range(2):
            submodel = specialise(open_streamed(run / "submodels" / str(k), dtype=torch.float32, device="cpu"))
            yield token_nats(submodel, [tokens], prefix=encoder.prefix, sequence_length=LENGTH) * count

    return ensemble_nats(each, nats(), lambda contexts: clusters.costs(encoder.decode(contexts), contexts))


@pytest.mark.parametrize(
    "kind", ["tfidf_svd", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mean_token", "hidden_state"))]
)
def test_log_probabilities_are_those_of_the_evaluation(
    kind: str, run: Path, documents: Documents, text: list[int], tmp_path: Path
) -> None:
    source = run_with(kind, run, documents, tmp_path)
    code, output = export(source, tmp_path / "ensemble")
    assert code == 0, output
    model, ids = EnsembleForCausalLM.from_pretrained(tmp_path / "ensemble"), torch.tensor([text])
    with torch.no_grad():
        log_p_LV, w_LC = model(ids).logits[0], model.log_weights(ids)[0].exp()
    assert len(text) > 200
    positions = np.arange(0, len(text) - 1, 8)
    found = log_p_LV[positions, ids[0, 1 + positions]].numpy()
    assert -found == pytest.approx(measured(source, np.array(text[1:], dtype=np.int32), positions), abs=1e-5)
    assert w_LC.sum(dim=1).numpy() == pytest.approx(np.ones(len(text)), abs=1e-6)
    assert log_p_LV.exp().sum(dim=1).numpy() == pytest.approx(np.ones(len(text)), abs=1e-5)
    assert w_LC[:64].unique().tolist() == [0.5]
    assert abs(w_LC[64:] - 0.5).max() > 0.05


def test_the_loss_is_that_of_the_report(
    run: Path, model: EnsembleForCausalLM, documents: Documents, text: list[int]
) -> None:
    report = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["ensemble"]
    nats = 0.0
    for tokens in documents.tokens:
        ids = torch.tensor([[text[0], *tokens.tolist()]])
        with torch.no_grad():
            nats += model(ids, labels=ids).loss.item() * len(tokens)
    assert sum(map(len, documents.tokens)) == report["tokens"]
    assert nats / report["tokens"] == pytest.approx(report["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.ecosystem("Use: ensemble of the sub-models in transformers", "transformers")
def test_it_loads_where_our_package_is_absent(
    package: Path, model: EnsembleForCausalLM, text: list[int], tmp_path: Path
) -> None:
    tree = ast.parse((package / "modeling_ensemble.py").read_text(encoding="utf-8"))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    assert {str(name).split(".")[0] for name in modules} - sys.stdlib_module_names == {
        "huggingface_hub",
        "numpy",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    }
    found, ids = loaded_alone(str(package), text, tmp_path, HF_HUB_OFFLINE="1"), torch.tensor([text])
    with torch.no_grad():
        assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
    assert found["made"] == model.generate(ids[:, :70], max_new_tokens=8, do_sample=False)[0].tolist()
    assert len(found["made"]) > 70
    assert found["ids"] == AutoTokenizer.from_pretrained(package, trust_remote_code=False)("def f(x):")["input_ids"]


@pytest.mark.ecosystem("Use: ensemble of the sub-models in transformers", "transformers")
def test_it_loads_in_an_environment_that_was_not_made_for_it(
    package: Path,
    model: EnsembleForCausalLM,
    text: list[int],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    if VLLM.python is None:
        pytest.skip(VLLM.missing)
    record_property(VERSION, VLLM.version("transformers"))
    found, ids = loaded_alone(str(package), text, tmp_path, VLLM.python, HF_HUB_OFFLINE="1"), torch.tensor([text])
    with torch.no_grad():
        assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
    assert found["made"] == model.generate(ids[:, :70], max_new_tokens=8, do_sample=False)[0].tolist()


def test_generation_with_caches_and_padding_is_that_without(model: EnsembleForCausalLM, text: list[int]) -> None:
    short, settings = text[:41], {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False}
    ids = torch.tensor([text[:100], [0] * 59 + short])
    mask = torch.tensor([[1] * 100, [0] * 59 + [1] * 41])
    for beams in (1, 2):
        made = model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=True, **settings)
        assert (
            made.tolist()
            == model.generate(ids, attention_mask=mask, num_beams=beams, use_cache=False, **settings).tolist()
        )
        alone = model.generate(torch.tensor([short]), num_beams=beams, **settings)
        assert made[1, 59:].tolist() == alone[0].tolist()
    steps = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    with torch.no_grad():
        at_once = model(
            steps.sequences, attention_mask=torch.cat([mask, torch.ones(2, 30, dtype=torch.int64)], dim=1)
        ).logits
        assert torch.allclose(torch.stack(steps.logits, dim=1), at_once[:, 99:-1], atol=1e-4)
        cache = model(ids[:1, :90], use_cache=True).past_key_values
        rest = model(ids[:1, 90:], past_key_values=cache, document_ids=ids[:1]).logits
        assert torch.allclose(rest, model(ids[:1]).logits[:, 90:], atol=1e-5)
        with pytest.raises(ValueError, match="pass all tokens so far as document_ids"):
            model(ids[:1, 90:], past_key_values=cache)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own, at a plain upload
def test_a_pushed_ensemble_loads_from_the_hub(
    package: Path, model: EnsembleForCausalLM, text: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "me/ensemble"
    with hub(tmp_path / "hub-cache") as server:
        monkeypatch.setenv("HF_TOKEN", server.token)
        pushed = CliRunner().invoke(app, ["push", str(package), name, "--json"])
        assert pushed.exit_code == 0, pushed.output
        stored = server.repositories[name].commits[server.repositories[name].branches["main"]]
        assert {**contents(package), ".gitattributes": b""} == {
            **stored,
            "manifest.json": contents(package)["manifest.json"],
        }
        found = loaded_alone(name, text, tmp_path)
    ids = torch.tensor([text])
    with torch.no_grad():
        assert found["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_the_card_has_the_ensembles_origin_and_its_own_results(run: Path, package: Path) -> None:
    card = ModelCard.load(package / "README.md")
    measured = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["ensemble"]
    sources = {f"held-out text: {each['source']}": each for each in measured["sources"]}
    assert sources
    assert {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results} == {
        (name, kind): round(figures[kind], 6)
        for name, figures in {"held-out text": measured, **sources}.items()
        for kind in ("loss", "perplexity", "bits_per_byte")
    }
    assert {"ensemble", "custom_code"} < set(card.data.tags)
    assert "trust_remote_code=True" in card.content
    assert "c-BTM" in card.content
    facts = ModelFacts(base_model="org/base", license="mit", language=["de"], datasets=["org/text"])
    report = current_report(run).model_copy(update={"evaluation": EvaluationRecord()})
    data = ModelCard(ensemble_card(report, ExportSummary(parameters=1, active_parameters=1, facts=facts))).data
    assert (data.base_model, data.license, data.language, data.datasets, data.eval_results) == (
        "org/base",
        "mit",
        ["de"],
        ["org/text"],
        None,
    )


def test_each_folder_is_a_submodel_as_it_was_trained(run: Path, package: Path) -> None:
    for k in range(2):
        check_same(open_checkpoint(package / str(k)), open_checkpoint(run / "submodels" / str(k)))
    assert AutoModelForCausalLM.from_pretrained(package / "0")(torch.tensor([[1, 2]])).logits.isfinite().all()
    assert {path.name for path in package.iterdir()} == {
        "0",
        "1",
        "router",
        "config.json",
        "modeling_ensemble.py",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    }
    assert not list(package.parent.glob(".export-*"))


def test_a_run_at_a_uri_gives_the_same_package(
    run: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with s3_server("runs") as server:
        place = f"s3://runs/team/small?endpoint_override={server}&scheme=http"
        store = dataclasses.replace(RunStore.of(place), pauses=(0.0,))
        shutil.copytree(run, store.directory, ignore=shutil.ignore_patterns("manifest.json"))
        store.publish(
            *(store.directory / name for name in ("config.json", "report.json", "corpus", "clusters", "submodels"))
        )
        shutil.rmtree(cache_directory())
        code, output = export(place, tmp_path / "ensemble")
    assert code == 0, output
    assert contents(tmp_path / "ensemble") == contents(package)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_mistakes_are_one_line_and_write_nothing(run: Path, documents: Documents, tmp_path: Path) -> None:
    random = run_with("mean_token", run, documents, tmp_path)
    (random / "clusters" / "cluster_model" / "vectoriser.json").write_text('{"kind": "random"}', encoding="utf-8")
    accept_as_input(random / "clusters")
    whole = pipeline.claim(config_at(tmp_path / "whole", tokens={"finetune_share": 1.0}, export={}), redo=False)
    begun = pipeline.claim(config_at(tmp_path / "begun"), redo=False)
    sizes = {"num_experts": 2, "num_experts_per_tok": 2, "fields": {"n_group": 1, "topk_group": 1}}
    single = pipeline.claim(
        config_at(tmp_path / "single", export={}, model={"family": "glm4_moe", "config": sizes}), redo=False
    )
    own = pipeline.claim(config_at(tmp_path / "own", export={}, model={"family": "llama_moe"}), redo=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for source, target, options, message in [
        (run, "full", (), "--output: '.*full': is not an empty directory; choose another directory"),
        (tmp_path / "none", "out", (), "RUN_DIR: '.*none': holds no run; name one that"),
        (begun, "out", (), "RUN_DIR: '.*': has no trained sub-models yet; resume it with `moedisco run`"),
        (whole, "out", (), "RUN_DIR: '.*': has no sub-models, since seed_share and finetune_share are 1 together"),
        (random, "out", (), "RUN_DIR: '.*': has clusters of the kind random, which have no centre to route by"),
        (single, "out", (), "RUN_DIR: '.*': has sub-models with 1 expert, with which transformers cannot run glm4_moe"),
        (own, "out", (), "RUN_DIR: '.*': has sub-models of llama_moe, which transformers does not have; use `--to hf`"),
        (
            run,
            "out",
            ("--from-checkpoint",),
            "--from-checkpoint: an ensemble has the trained sub-models, not the fine-tune",
        ),
    ]:
        code, output = export(source, tmp_path / target, *options)
        assert code == 2, output
        assert re.search(message, " ".join(output.split())), output
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
