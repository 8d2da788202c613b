"""What an evaluation says of sub-models that stay apart: the sentence, and the figures of the model that results."""

from __future__ import annotations

import math

from moedisco_ray.core.records.findings import FEW_DOCUMENTS
from moedisco_ray.core.records.summaries import ApartRecord, EvaluationRecord


def keeps_apart(evaluation: EvaluationRecord) -> bool:
    """Whether the run's model is the ensemble of its sub-models."""
    return evaluation.apart is not None and evaluation.apart.kept_apart


def of_result(evaluation: EvaluationRecord) -> EvaluationRecord:
    """The figures of the run's model: the ensemble's if the sub-models stay apart, else the evaluation itself."""
    return of_ensemble(evaluation) if keeps_apart(evaluation) else evaluation


def of_ensemble(evaluation: EvaluationRecord) -> EvaluationRecord:
    """The figures of the sub-models as an ensemble; empty if it was not measured.

    They are those on the validation text, and the start's on the same text: unseen text and tasks, and routers, are
    measured on the merged model alone.
    """
    if evaluation.ensemble is None:
        return EvaluationRecord()
    others = {"start", "xz_bits_per_byte"} & evaluation.model_fields_set
    return EvaluationRecord.model_validate(
        evaluation.ensemble.model_dump(exclude_unset=True) | {name: getattr(evaluation, name) for name in others}
    )


def apart_note(evaluation: EvaluationRecord) -> str | None:
    """A sentence on whether the sub-models stay apart or are merged, and why; None if the two were not compared."""
    found = evaluation.apart
    if found is None:
        return None
    if found.cluster is None or found.merged is None or found.apart is None:
        why = "as export.keep_apart asks" if found.asked else "no cluster has a validation document"
        return f"the sub-models {'stay apart' if found.kept_apart else 'are merged'}: {why}"
    lost = found.merged - found.apart
    if found.kept_apart:
        asked = ", as export.keep_apart asks" if found.asked and not lost > found.limit else ""
        note = f"the sub-models stay apart{asked}: merged, the model {_change(lost)} on cluster {found.cluster}"
    else:
        most = f"the merged model {_change(lost)} on cluster {found.cluster}, where it does worst"
        note = f"the sub-models are merged: {most}, and {found.limit:g} nats are allowed"
    return note + _doubts(found)


def _change(lost: float) -> str:
    """What a merge costs (nats per token), in words."""
    if not math.isfinite(lost):
        return "has no loss that is a number"
    return f"is {abs(lost):.{2 if abs(lost) >= 0.01 else 4}f} nats {'worse' if lost > 0 else 'better'}"


def _doubts(found: ApartRecord) -> str:
    """What makes the comparison uncertain, after a semicolon."""
    note = ""
    if found.documents < FEW_DOCUMENTS:
        note += f"; the cluster has only {found.documents} validation documents"
    if found.unmeasured:
        names = ", ".join(map(str, found.unmeasured))
        note += f"; clusters without a validation document were not compared: {names}"
    return note
