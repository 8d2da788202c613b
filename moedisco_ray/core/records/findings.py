"""What an evaluation found, as text: the rows, tables and sentences that a terminal and a model card show alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from moedisco_ray.core.limits import MOST_READINGS
from moedisco_ray.core.records.bill import format_seconds
from moedisco_ray.core.records.run_record import Curve, StartComparison
from moedisco_ray.core.records.summaries import (
    CorpusSummary,
    EnsembleFigures,
    EvaluationRecord,
    Figures,
    StartFigures,
    UnseenFigures,
)
from moedisco_ray.core.stages import OF_CLUSTERS

FEW_DOCUMENTS = 30
"""Number of documents below which the figures of a cluster or a validation set are mostly noise."""
WITH_START = "with the start model"
"""End of the name of a result of the model that the run started from."""
_APART = "sub-models as an ensemble"
_UNSEEN = ", never trained on"
_NAMED = 8
_LARGEST_LOSS = 700.0
"""Maximum loss whose perplexity is computed: e to the power of 710 is no number."""
_COPIES = 0.9
"""Cosine between the weights of two experts above which they are nearly copies: 0.99 was measured in a small
upcycled MoE after its training."""
_USELESS_READINGS = 16
"""Number of times after which reading the same text again gains little (Muennighoff et al., arXiv 2305.16264)."""
_OWN_EXPERT = 1.5
"""Ratio of an expert's load on a source to that on others from which it counts as the source's own."""
_ROUNDING = 1e-4
"""Difference of two losses that rounding may make (nats per token)."""

_LAST = 2 / 3
"""Share of a run's tokens after which its slope is measured."""
_FEWEST_POINTS = 8
"""Fewest losses from which a slope is fitted."""

TASK_COLUMNS = ("task", "accuracy", "by length", "chance", "examples")


def evaluation_rows(evaluation: EvaluationRecord) -> list[tuple[str, Figures]]:
    """Named results on text: the validation text as a whole and per source, and text that was never trained on.

    The figures of the model that the run started from follow those of the result.
    """
    unseen, start = evaluation.unseen or UnseenFigures(), evaluation.start or StartFigures()
    merged = _merged(evaluation)
    rows = _with_start("all", evaluation, evaluation.start, merged) if evaluation.documents else []
    if evaluation.ensemble is not None:
        rows.append((_APART, evaluation.ensemble))
    before: dict[str, Figures] = {entry.source: entry for entry in start.sources}
    for entry in evaluation.sources:
        rows += _with_start(entry.source, entry, before.get(entry.source), merged)
    for owner, held_out in evaluation.owners.items():
        rows.append((f"{owner}'s text", held_out))
        rows += [
            (f"{owner}'s text, with the owner's sub-model", figures)
            for name, figures in held_out.stages.items()
            if name in OF_CLUSTERS
        ]
    if len(unseen.sources) > 1:
        rows += _with_start(f"all{_UNSEEN}", unseen, unseen.start, merged)
    before = {} if unseen.start is None else {entry.source: entry for entry in unseen.start.sources}
    for entry in unseen.sources:
        rows += _with_start(f"{entry.source}{_UNSEEN}", entry, before.get(entry.source), merged)
    return rows


def _merged(evaluation: EvaluationRecord) -> str:
    """End of the names of figures of the merged model, in a run whose sub-models stay apart."""
    return ", merged" if evaluation.apart is not None and evaluation.apart.kept_apart else ""


def cluster_rows(evaluation: EvaluationRecord) -> list[tuple[str, Figures]]:
    """Named results on the validation text of each cluster; those of ensemble and start follow those of the model."""
    before = {} if evaluation.start is None else {entry.cluster: entry for entry in evaluation.start.clusters}
    ensemble = evaluation.ensemble or EnsembleFigures()
    apart = {entry.cluster: entry for entry in ensemble.clusters}
    rows: list[tuple[str, Figures]] = []
    for entry in evaluation.clusters:
        name = f"cluster {entry.cluster}"
        first, *rest = _with_start(name, entry, before.get(entry.cluster), _merged(evaluation))
        if entry.cluster in apart:
            rest = [(f"{name}, {_APART}", apart[entry.cluster]), *rest]
        rows += [first, *rest]
    return rows


def _with_start(name: str, figures: Figures, start: Figures | None, end: str = "") -> list[tuple[str, Figures]]:
    return [(f"{name}{end}", figures), *([] if start is None else [(f"{name}, {WITH_START}", start)])]


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
    note = f"{known}{dead} of {experts} experts are dead (under 1 % of an even load)"
    similar = [router.similarity for router in evaluation.routers if router.similarity is not None]
    if similar and (mean := sum(similar) / len(similar)) > _COPIES:
        note += (
            f"; warning: the experts of a layer are nearly copies of each other (cosine {mean:.2f}), so the model "
            "computes little more than one with fewer experts would"
        )
    return note


def learnt_notes(evaluation: EvaluationRecord, corpus: CorpusSummary, tokens: int) -> list[str]:
    """Sentences on what the figures mean: against a plain compressor, how often the text was read, who reads what.

    Args:
        evaluation: What was measured.
        corpus: Summary of the corpus stage.
        tokens: Number of tokens that the run trained on.
    """
    notes = []
    ours, plain = evaluation.bits_per_byte, evaluation.xz_bits_per_byte
    if ours is not None and plain is not None:
        meaning = (
            "the model has learnt more than repetitions"
            if ours < plain
            else "the model has not yet learnt more than repetitions; train on more tokens"
        )
        notes.append(f"{ours:.2f} bits per byte of held-out text, where xz needs {plain:.2f}: {meaning}")
    if corpus.tokens and tokens:
        notes.append(reading_note(tokens, corpus.tokens, "the text was read"))
    return [*notes, *_readers(evaluation.load_by_source)]


def is_read_often(tokens: int, text_tokens: int) -> bool:
    """Whether a training repeats its text so often that more text would help more than more training."""
    return tokens > MOST_READINGS * text_tokens


def reading_note(tokens: int, text_tokens: int, start: str = "the text is read") -> str:
    """How often a training reads its text; where it is often, a sentence on what that means.

    Args:
        tokens: Number of tokens of the training.
        text_tokens: Number of tokens of the text.
        start: Beginning of the note.
    """
    times = tokens / text_tokens
    exact = f"{times:,.0f}" if times >= 100 else f"{times:.1f}" if times >= 1 else f"{times:.2g}"
    note = f"{start} {exact} times"
    if not is_read_often(tokens, text_tokens):
        return note
    return (
        f"{note}; up to {MOST_READINGS} are nearly as good as new text, and more than {_USELESS_READINGS} gain little: "
        "add text, or lower tokens.total"
    )


def slope_note(curve: Curve | None, tokens: int, seconds: float) -> str | None:
    """What the last third of a run's tokens gained, and what as many tokens again would gain at that slope.

    The loss is fitted as a line over the logarithm of the tokens. None if the whole model did not train on all of the
    last third, or if its losses are too few or too noisy for a slope.

    Args:
        curve: Losses of the whole model's training, the last one of the run.
        tokens: Number of tokens that the run trained on.
        seconds: Time of that training (s).
    """
    if curve is None or not tokens or not curve.tokens:
        return None
    trained = curve.tokens[-1]
    points = [
        (math.log2(tokens - trained + count), loss)
        for count, loss in zip(curve.tokens, curve.loss, strict=True)
        if tokens - trained + count >= _LAST * tokens and math.isfinite(loss)
    ]
    if trained < (1 - _LAST) * tokens or len(points) < _FEWEST_POINTS:
        return None
    places, losses = zip(*points, strict=True)
    slope, start = statistics.linear_regression(places, losses)
    spread = math.sqrt(sum((place - statistics.fmean(places)) ** 2 for place in places))
    noise = math.sqrt(sum((loss - start - slope * place) ** 2 for place, loss in points) / (len(points) - 2)) / spread
    if not slope <= -2 * noise:
        return None
    taken = format_seconds(seconds * (1 - _LAST) * tokens / trained)
    return (
        f"over the last third of the tokens, {taken}, the training loss fell by {-slope * -math.log2(_LAST):.2f}; "
        f"twice the tokens: about {slope:.2f}"
    )


def _readers(load_by_source: Mapping[str, Sequence[float]]) -> Iterable[str]:
    """For each source with an expert of its own, the expert that is selected most often beyond its share elsewhere."""
    for source, load_E in load_by_source.items() if len(load_by_source) > 1 else ():
        others = [load for name, load in load_by_source.items() if name != source]
        elsewhere_E = [sum(loads) / len(others) for loads in zip(*others, strict=True)]
        expert = max(range(len(load_E)), key=lambda e: load_E[e] - elsewhere_E[e])
        if load_E[expert] > _OWN_EXPERT * elsewhere_E[expert]:
            yield (
                f"expert {expert} takes {load_E[expert]:.0%} of the selections on {source}, and "
                f"{elsewhere_E[expert]:.0%} on other sources"
            )


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
    warnings += _row_warnings(sources)
    if summary["skipped_files"]:
        warnings.append(f"{summary['skipped_files']:,} files could not be read and were left out (on_error: skip)")
    if summary["passed_over_files"]:
        warnings.append(
            f"{summary['passed_over_files']:,} files were passed over, since their source holds tables, JSON Lines or "
            "a saved data set, which are read instead; name them by a source of their own, or leave them out by "
            "`exclude`"
        )
    if cut := summary.get("cut_conversations"):
        warnings.append(
            f"{cut:,} conversations are longer than a training sequence, and their last {summary['cut_tokens']:,} "
            "tokens are not trained on; raise corpus.sequence_length, or divide them"
        )
    return warnings


def _row_warnings(sources: Mapping[str, Any]) -> Iterator[str]:
    for name, found in sources.items():
        if found.get("skipped_rows"):
            yield (
                f"{found['skipped_rows']:,} rows of {name} could not be read and were left out; the first because "
                f"{found['skip_reason']}"
            )
        if found.get("unread_fields"):
            yield (
                f"messages of {name} have fields that the chat template does not read, and that are not trained on: "
                f"{', '.join(found['unread_fields'])}"
            )


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
