"""What differs between runs: settings, stages, cost, held-out figures by source, samples.

Every list in a comparison has one entry per run, in the order in which the runs were named; None where a run has none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from moedisco_ray.core.records.run_record import RunReport, StageReport
from moedisco_ray.core.records.summaries import EnsembleFigures, EvaluationRecord, Figures

T = TypeVar("T")

MOST_RUNS = 5
_OWN = frozenset({"name", "output", "tags"})
"""Settings that say nothing of the training; every run has its own."""
_OF_TEXT = ("corpus.", "tokenizer.", "seed", "evaluation.max_tokens")
"""Beginnings of the settings that the tokens of the validation text depend on."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """A setting with other values in some runs; dotted path, and None where it is not set."""

    setting: str
    values: list[Any]


@dataclasses.dataclass(frozen=True)
class ComparedStage:
    """A stage: seconds, dollars, tokens that it trained on, and perplexity on the validation text."""

    stage: str
    seconds: list[float | None]
    dollars: list[float | None]
    tokens: list[int | None]
    perplexity: list[float | None]


@dataclasses.dataclass(frozen=True)
class ComparedSource:
    """Held-out text of one source; `all` is the whole validation text."""

    source: str
    perplexity: list[float | None]
    bits_per_byte: list[float | None]


@dataclasses.dataclass(frozen=True)
class ComparedSample:
    """Continuations of one prompt."""

    prompt: str
    texts: list[str | None]


def differing(documents: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Settings that differ between configurations, in the order of the first configuration that has them."""
    flat = [dict(_leaves(document)) for document in documents]
    found = []
    for setting in dict.fromkeys(itertools.chain.from_iterable(flat)):
        values = [each.get(setting) for each in flat]
        if setting.split(".")[0] not in _OWN and any(value != values[0] for value in values):
            found.append(Difference(setting, values))
    return found


def same_text(differences: Sequence[Difference], reports: Sequence[RunReport]) -> bool:
    """Whether held-out figures can be compared: they are of the same tokens.

    A run without a digest of its text is compared by the settings of the text, and by how much of it was measured.
    """
    measured = [each.evaluation for each in reports if _is_measured(each)]
    if measured and all(each.digest is not None for each in measured):
        return len({each.digest for each in measured}) <= 1
    amounts = {(each.documents, each.tokens) for each in measured}
    return len(amounts) <= 1 and not any(each.setting.startswith(_OF_TEXT) for each in differences)


def result_of(report: RunReport) -> EvaluationRecord | EnsembleFigures | None:
    """Held-out figures of the model that a run leaves: of the ensemble if its sub-models stay apart."""
    if not _is_measured(report):
        return None
    evaluation = report.evaluation
    is_apart = evaluation.apart is not None and evaluation.apart.kept_apart
    return evaluation.ensemble if is_apart and evaluation.ensemble is not None else evaluation


def compared_stages(reports: Sequence[RunReport]) -> list[ComparedStage]:
    """Every stage that any run has finished."""
    found = [_stages(report) for report in reports]
    made = []
    for name in _ordered(found):
        stages = [each.get(name) for each in found]
        compared = ComparedStage(
            name,
            [None if stage is None else stage.seconds for stage in stages],
            [None if stage is None else stage.dollars for stage in stages],
            [None if stage is None else stage.tokens for stage in stages],
            [None if stage is None else stage.perplexity for stage in stages],
        )
        made.append(compared)
    return made


def compared_sources(reports: Sequence[RunReport]) -> list[ComparedSource]:
    """The whole validation text, then every source that any run was measured on."""
    found = [_sources(report) for report in reports]
    made = []
    for name in _ordered(found):
        figures = [each.get(name, Figures()) for each in found]
        perplexity = [each.perplexity for each in figures]
        made.append(ComparedSource(name, perplexity, [each.bits_per_byte for each in figures]))
    return made


def compared_samples(reports: Sequence[RunReport]) -> list[ComparedSample]:
    """Every prompt that any run has continued."""
    found = [_samples(report) for report in reports]
    made = []
    for prompt in _ordered(found):
        texts = [each.get(prompt) for each in found]
        made.append(ComparedSample(prompt, texts))
    return made


def _stages(report: RunReport) -> dict[str, StageReport]:
    return {stage.name: stage for stage in report.stages}


def _samples(report: RunReport) -> dict[str, str]:
    return {sample.prompt: sample.text for sample in report.samples}


def _sources(report: RunReport) -> dict[str, Figures]:
    result = result_of(report)
    if result is None:
        return {}
    return {"all": result, **{each.source: each for each in result.sources}}


def _is_measured(report: RunReport) -> bool:
    return report.evaluation.perplexity is not None


def _ordered(found: Iterable[Mapping[str, T]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _leaves(document: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
