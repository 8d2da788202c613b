"""The front matter of the model card, read back by huggingface_hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, metadata_load
from test_report import EXPORTED, run_config, write_run

from moedisco_ray.core.config import Model
from moedisco_ray.core.records.export_summary import ModelFacts
from moedisco_ray.core.records.report import build_report
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import EvaluationRecord
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.core.store.hub import dataset_name
from moedisco_ray.stages.export.card import model_card
from moedisco_ray.stages.export.front_matter import facts_of, front_matter

START_CARD = """---
license: other
license_name: tiny-licence
license_link: LICENSE
language: [en, de]
base_model: [tiny-org/ancestor]
datasets: [someone/elses]
---
# A model
"""


@pytest.fixture
def report(tmp_path: Path) -> RunReport:
    write_run(tmp_path)
    write_json(
        tmp_path / "evaluation" / "evaluation.json",
        {
            "loss": 3.0,
            "perplexity": 20.085537,
            "bits_per_byte": 1.5,
            "documents": 4,
            "tokens": 90,
            "sources": [{"source": "wiki", "loss": 2.5, "perplexity": 12.182494}],
            "start": {"loss": 4.0, "perplexity": 54.6, "documents": 4},
            "unseen": {"sources": [{"source": "law", "perplexity": 30.0}]},
            "lm_eval": [{"task": "facts", "examples": 9, "acc": 0.5}],
        },
    )
    return build_report(tmp_path, run_config())


def start(directory: Path) -> Model:
    return Model.model_validate({"init": {"checkpoint": str(directory)}})


def test_the_hub_reads_the_origin_and_the_measured_figures(report: RunReport, tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "README.md").write_text(START_CARD)
    facts = facts_of(start(tmp_path / "start"), ["org/text"])
    card = ModelCard(model_card(report, EXPORTED.model_copy(update={"facts": facts})))
    data = card.data
    assert (data.base_model, data.license, data.license_name, data.license_link) == (
        "tiny-org/ancestor",
        "other",
        "tiny-licence",
        "LICENSE",
    )
    assert (data.language, data.datasets, data.library_name, data.pipeline_tag) == (
        ["en", "de"],
        ["org/text"],
        "transformers",
        "text-generation",
    )
    assert data.model_name == report.name
    assert {(each.dataset_name, each.metric_type): each.metric_value for each in data.eval_results} == {
        ("held-out text", "loss"): 3.0,
        ("held-out text", "perplexity"): 20.085537,
        ("held-out text", "bits_per_byte"): 1.5,
        ("held-out text: wiki", "loss"): 2.5,
        ("held-out text: wiki", "perplexity"): 12.182494,
        ("held-out text: law, never trained on", "perplexity"): 30.0,
        ("facts", "accuracy"): 0.5,
    }
    assert card.content.startswith("---\n")


def test_a_model_of_the_hub_is_the_base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text(START_CARD)
    monkeypatch.setattr("moedisco_ray.core.config.start_files.local_model", lambda *_, **__: tmp_path)
    found = facts_of(Model.model_validate({"init": {"checkpoint": "hf://org/name", "commit": "0" * 40}}), [])
    assert (found.base_model, found.license) == ("org/name", "other")


def test_what_is_not_known_is_left_out(report: RunReport) -> None:
    bare = report.model_copy(update={"evaluation": type(report.evaluation)()})
    card = ModelCard(model_card(bare, EXPORTED))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "moe-disco", "qwen3_moe"],
    }
    assert facts_of(Model(), []) == ModelFacts(datasets=[])


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# no front matter",
        "---\n: [\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: [mit, other]\nlanguage: 3\n---\n",
        "---\nlicense: {a: b}\n---\n",
        "---\n---\n",
    ],
)
def test_a_card_that_cannot_be_used_says_nothing(tmp_path: Path, card: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    found = facts_of(start(tmp_path), [])
    assert found.model_dump(exclude_none=True) == {"language": [], "datasets": []}


@pytest.mark.parametrize("name", ["no", "a: b # c", "- x", "'\"", "é 漢", "|", "1e3"])
def test_any_name_survives_the_way_through_yaml(tmp_path: Path, name: str) -> None:
    evaluation = EvaluationRecord.model_validate(
        {"loss": 1.0, "documents": 1, "sources": [{"source": name, "loss": 1.0}]}
    )
    made = RunReport.model_construct(name="x", family="mixtral", evaluation=evaluation)
    (tmp_path / "README.md").write_text(
        front_matter(made, ModelFacts(license=name, language=[name])) + "\n\n# x\n", encoding="utf-8"
    )
    found = metadata_load(tmp_path / "README.md")
    assert (found["license"], found["language"]) == (name, [name])
    assert [each["dataset"]["name"] for each in found["model-index"][0]["results"]] == [
        "held-out text",
        f"held-out text: {name}",
    ]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hf://datasets/org/text", "org/text"),
        ("hf://datasets/org/text/data/*.parquet", "org/text"),
        ("hf://datasets/org/text@main/x.jsonl", "org/text"),
        ("hf://org/model", None),
        ("s3://datasets/org/text", None),
        ("texts/wiki", None),
        ("hf://datasets/org", None),
    ],
)
def test_data_sets_by_their_path(path: str, name: str | None) -> None:
    assert dataset_name(path) == name
