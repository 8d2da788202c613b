"""Front matter of the model card for the Hugging Face hub: base model, licence, languages, data sets, figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load

from moedisco_ray.core.config import LocalInit, Model
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.records.export_summary import ModelFacts
from moedisco_ray.core.records.findings import WITH_START, evaluation_rows
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import EvaluationRecord, Figures
from moedisco_ray.core.store.hub import hub_parts, is_hub
from moedisco_ray.core.store.locations import Location, parent
from moedisco_ray.core.store.read_roots import opened

_TASK = "text-generation"
_CARD = "README.md"


def facts_of(start: Model, datasets: list[str]) -> ModelFacts:
    """What is known of a run's model from the card of the model that it started from.

    A model of the hub is the base model; any other start has the base model that its own card names.

    Args:
        start: The run's model section.
        datasets: Names of the data sets of the hub that the run trained on.
    """
    if not isinstance(start.init, LocalInit):
        return ModelFacts(datasets=datasets)
    card, place = _front_matter(start_directory(start.init)), start.init.place
    return ModelFacts(
        base_model=hub_parts(str(place))[0] if is_hub(place) else _text(card, "base_model"),
        license=_text(card, "license"),
        license_name=_text(card, "license_name"),
        license_link=_text(card, "license_link"),
        language=_texts(card, "language"),
        datasets=datasets,
    )


def front_matter(report: RunReport, facts: ModelFacts, tags: Sequence[str] = ("mixture-of-experts",)) -> str:
    """The YAML at the beginning of a model card, between its lines of dashes."""
    results = list(_results(report.evaluation))
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=[*tags, "moe-disco", report.family],
        base_model=facts.base_model,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        language=facts.language or None,
        datasets=facts.datasets or None,
        eval_results=results or None,
        model_name=report.name if results else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def combined_front_matter(
    name: str,
    family: str,
    facts: Sequence[ModelFacts],
    texts: Sequence[Location],
    losses: Sequence[float],
    *,
    tags: Sequence[str] = (),
) -> str:
    """The YAML of a model that is made of other models; its licence is left out unless all of them have the same one.

    Args:
        name: Name of the model.
        family: Its family.
        facts: What is known of each of the other models; the languages are those of the first.
        texts: Texts that it was measured on, which some of the models may have been trained on.
        losses: Its loss on each.
        tags: Further tags.
    """
    first, bases = facts[0], dict.fromkeys(each.base_model for each in facts if each.base_model is not None)
    alike = all((each.license, each.license_name) == (first.license, first.license_name) for each in facts)
    results = [
        each
        for text, loss in zip(texts, losses, strict=True)
        for each in _figures(f"text: {parent(text)[1]}", Figures(loss=loss, perplexity=math.exp(loss)))
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["mixture-of-experts", "moe-disco", *tags, family],
        base_model=list(bases) or None,
        language=first.language or None,
        license=first.license if alike else None,
        license_name=first.license_name if alike else None,
        license_link=first.license_link if alike else None,
        eval_results=results or None,
        model_name=name if results else None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _results(evaluation: EvaluationRecord) -> Iterator[EvalResult]:
    for name, figures in evaluation_rows(evaluation):
        if not name.endswith(WITH_START):
            yield from _figures("held-out text" if name == "all" else f"held-out text: {name}", figures)
    for task in evaluation.lm_eval:
        if task.acc is not None:
            yield _result(task.task, "accuracy", "Accuracy", task.acc)


def _figures(text: str, figures: Figures) -> Iterator[EvalResult]:
    for metric, title, value in (
        ("loss", "Loss (nats per token)", figures.loss),
        ("perplexity", "Perplexity", figures.perplexity),
        ("bits_per_byte", "Bits per byte", figures.bits_per_byte),
    ):
        if value is not None:
            yield _result(text, metric, title, value)


def _result(text: str, metric: str, title: str, value: float) -> EvalResult:
    # Results of one type and configuration are grouped under one name, so each text is a configuration.
    return EvalResult(
        task_type=_TASK,
        dataset_type="custom",
        dataset_config=text,
        dataset_name=text,
        metric_type=metric,
        metric_name=title,
        metric_value=round(value, 6),
    )


def _front_matter(directory: Path) -> Mapping[str, Any]:
    """Front matter of a model's card; empty without a card, and if its front matter is no YAML."""
    path = directory / _CARD
    if not path.is_file():
        return {}
    try:
        with opened(path) as found:
            return metadata_load(found) or {}
    except (ValueError, yaml.YAMLError):
        return {}


def _text(card: Mapping[str, Any], name: str) -> str | None:
    found = card.get(name)
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    return found if isinstance(found, str) else None


def _texts(card: Mapping[str, Any], name: str) -> list[str]:
    found = card.get(name)
    return [each for each in (found if isinstance(found, list) else [found]) if isinstance(each, str)]
