"""What an evaluation found, as text: the rows, tables and sentences that a terminal and a model card show alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moedisco_ray.core.records.summaries import (
    CorpusSummary,
    EvaluationRecord,
    Figures,
    StartComparison,
    StartFigures,
    UnseenFigures,
)

FEW_DOCUMENTS = 30
"""Number of documents below which the figures of a cluster or a validation set are mostly noise."""
WITH_START = "with the start model"
"""End of the name of a result of the model that the run started from."""
_UNSEEN = ", never trained on"
_NAMED = 8
_LARGEST_LOSS = 700.0
"""Maximum loss whose perplexity is computed: e to the power of 710 is no number."""
_ROUNDING = 1e-4
"""Difference of two losses that rounding may make (nats per token)."""

TASK_COLUMNS = ("task", "accuracy", "by length", "chance", "examples")


def evaluation_rows(evaluation: EvaluationRecord) -> list[tuple[str, Figures]]:
    """Named results on text: the validation text as a whole and per source, and text that was never trained on.

    The figures of the model that the run started from follow those of the result.
    """
    unseen, start = evaluation.unseen or UnseenFigures(), evaluation.start or StartFigures()
    rows = _with_start("all", evaluation, evaluation.start) if evaluation.documents else []
    if evaluation.ensemble is not None:
        rows.append(("sub-models as an ensemble", evaluation.ensemble))
    before: dict[str, Figures] = {entry.source: entry for entry in start.sources}
    for entry in evaluation.sources:
        rows += _with_start(entry.source, entry, before.get(entry.source))
    for owner, held_out in evaluation.owners.items():
        rows.append((f"{owner}'s text", held_out))
        if "submodels" in held_out.stages:
            rows.append((f"{owner}'s text, with the owner's sub-model", held_out.stages["submodels"]))
    if len(unseen.sources) > 1:
        rows += _with_start(f"all{_UNSEEN}", unseen, unseen.start)
    before = {} if unseen.start is None else {entry.source: entry for entry in unseen.start.sources}
    for entry in unseen.sources:
        rows += _with_start(f"{entry.source}{_UNSEEN}", entry, before.get(entry.source))
    return rows


def cluster_rows(evaluation: EvaluationRecord) -> list[tuple[str, Figures]]:
    """Named results on the validation text of each cluster; those of the start model follow those of the result."""
    before = {} if evaluation.start is None else {entry.cluster: entry for entry in evaluation.start.clusters}
    return [
        row
        for entry in evaluation.clusters
        for row in _with_start(f"cluster {entry.cluster}", entry, before.get(entry.cluster))
    ]


def _with_start(name: str, figures: Figures, start: Figures | None) -> list[tuple[str, Figures]]:
    return [(name, figures), *([] if start is None else [(f"{name}, {WITH_START}", start)])]


def task_table(evaluation: EvaluationRecord) -> list[tuple[str, ...]]:
    """Results of lm-eval as text; each accuracy is followed by its standard error.

    Returns:
        Rows of `TASK_COLUMNS`.
    """
    return [
        (
            entry.task,
            _share(entry.acc, entry.acc_stderr),
            _share(entry.acc_norm, entry.acc_norm_stderr),
            _share(entry.chance),
            f"{entry.examples:,}",
        )
        for entry in evaluation.lm_eval
    ]


def expert_note(evaluation: EvaluationRecord) -> str | None:
    """A sentence on how specialised the experts are and how many are dead; None if this was not measured."""
    if not evaluation.specialisation:
        return None
    shared = ", ".join(
        f"{value:.2f} with its {label}" for label, value in evaluation.specialisation.items() if value is not None
    )
    dead, experts = (
        sum(router.dead for router in evaluation.routers),
        sum(len(router.load) for router in evaluation.routers),
    )
    known = f"normalised mutual information of a document's main expert: {shared}; " if shared else ""
    return f"{known}{dead} of {experts} experts are dead (under 1 % of an even load)"


def against_start(figures: Figures, start: Figures | None) -> StartComparison | None:
    """Compare a finished model with the trained model that its run started from.

    Args:
        figures: Figures of the finished model on held-out text.
        start: Figures of the start on the same text; None if it was not measured.

    Returns:
        The comparison; None for a run that starts from random weights, and if one of the two was not measured.
    """
    if start is None or start.loss is None or figures.loss is None:
        return None
    worse = not figures.loss - start.loss <= _ROUNDING  # a loss that is no number is worse, too
    perplexity, before = (math.exp(min(loss, _LARGEST_LOSS)) for loss in (figures.loss, start.loss))
    words = f"perplexity {perplexity:,.2f}, the start had {before:,.2f} on the same text"
    return StartComparison(
        worse=worse,
        perplexity=perplexity,
        start_perplexity=before,
        words=f"WORSE THAN ITS START: {words}" if worse else f"not worse than its start: {words}",
    )


def worse_than_start(figures: Figures, start: Figures | None) -> str | None:
    """The sentence with which every view of a result begins if the run ended worse than its start; None otherwise."""
    compared = against_start(figures, start)
    return compared.words if compared is not None and compared.worse else None


def start_note(evaluation: EvaluationRecord) -> str | None:
    """A sentence that compares the held-out losses of the run's model and of its start; None without the two losses."""
    start = evaluation.start
    if start is None or start.loss is None or evaluation.loss is None:
        return None
    change = evaluation.loss - start.loss
    worse = f"; {listed} got worse" if (listed := _listed(_worse(evaluation))) else ""
    return (
        f"the held-out loss is {evaluation.loss:.4f} nats per token, {abs(change):.4f} "
        f"{'above' if change > 0 else 'below'} the {start.loss:.4f} of the model that the run started from{worse}"
    )


def _worse(evaluation: EvaluationRecord) -> Iterable[str]:
    """Sources, of validation and unseen text, on which the finished model has a higher loss than the start model."""
    rows = dict(evaluation_rows(evaluation))
    for name, entry in rows.items():
        before = rows.get(f"{name}, {WITH_START}", Figures()).loss
        if (
            before is not None
            and entry.loss is not None
            and entry.loss > before
            and name not in ("all", f"all{_UNSEEN}")
        ):
            yield name.removesuffix(_UNSEEN)


def corpus_warnings(summary: Mapping[str, Any]) -> list[str]:
    """Sentences about the problems of a corpus.

    Args:
        summary: The corpus stage's summary, or an estimate with the keys `validation_documents`, `sources` (each with
            `documents` and `validation_documents`), `skipped_files` and `passed_over_files`.
    """
    sources = summary["sources"]
    untrained = [name for name, found in sources.items() if not found["documents"]]
    unmeasured = [name for name, found in sources.items() if found["documents"] and not found["validation_documents"]]
    few = [
        f"{name} ({found['validation_documents']})"
        for name, found in sources.items()
        if 0 < found["validation_documents"] < FEW_DOCUMENTS
    ]
    warnings = []
    if untrained:
        warnings.append(
            f"nothing is left to train on from {_listed(untrained)}: other sources have the same text, or `weight` is "
            "too small; add text, or remove the source"
        )
    if unmeasured:
        warnings.append(
            f"there are no validation documents from {_listed(unmeasured)}: all of its text is one document or one "
            "short passage; add text, or lower corpus.max_document_tokens"
        )
    if few:
        warnings.append(
            f"there are fewer than {FEW_DOCUMENTS} validation documents from {_listed(few)}, so that their figures are "
            "uncertain; raise corpus.validation_fraction, or add text"
        )
    if summary["validation_documents"] < FEW_DOCUMENTS and len(sources) > 1:
        warnings.append(
            f"all sources together have only {summary['validation_documents']} validation documents, so that all "
            "figures are uncertain; raise corpus.validation_fraction, or add text"
        )
    if summary["skipped_files"]:
        warnings.append(f"{summary['skipped_files']:,} files could not be read and were left out (on_error: skip)")
    if summary["passed_over_files"]:
        warnings.append(
            f"{summary['passed_over_files']:,} files were passed over, since their source holds tables, JSON Lines or "
            "a saved data set, which are read instead; name them by a source of their own, or leave them out by "
            "`exclude`"
        )
    return warnings


def left_out(corpus: CorpusSummary) -> list[str]:
    """One line for each file (up to a limit) that the corpus stage did not read.

    Only the run's owner may see these paths.
    """
    listed = [f"left out of {each.source}: {each.path} {each.reason}" for each in corpus.skipped]
    more = corpus.skipped_files + corpus.passed_over_files - len(listed)
    return [*listed, f"and {more:,} more files"] if more else listed


def cluster_warnings(documents: Sequence[int]) -> list[str]:
    """Sentences about the problems of clusters.

    Args:
        documents: Number of documents of each cluster.
    """
    few = [f"{number} ({count})" for number, count in enumerate(documents) if count < FEW_DOCUMENTS]
    remedy = "lower clusters.count, add text, or cut it finer (corpus.sources.*.documents)"
    return [f"fewer than {FEW_DOCUMENTS} documents are in clusters {_listed(few)}; {remedy}"] if few else []


def _listed(names: Iterable[str]) -> str:
    named = list(names)
    more = f" and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return ", ".join(named[:_NAMED]) + more


def _share(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
