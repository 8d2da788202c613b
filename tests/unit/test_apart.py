"""Sub-models that start from a trained model stay apart where a merge harms them, and are merged where it does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from moedisco_ray.core.limits import LOST_BY_MERGING
from moedisco_ray.core.records.apart import apart_note, of_result
from moedisco_ray.core.records.findings import evaluation_rows
from moedisco_ray.core.records.summaries import ApartRecord, ClusterFigures, EvaluationRecord
from moedisco_ray.stages.evaluate.apart import keep_apart

NAN, MANY = float("nan"), 100


def figures(losses: dict[int, float | None], documents: int = MANY) -> list[ClusterFigures]:
    return [ClusterFigures(cluster=cluster, loss=loss, documents=documents) for cluster, loss in losses.items()]


@pytest.mark.parametrize(
    ("merged", "apart", "kept", "cluster"),
    [
        ({0: 3.0, 1: 3.0}, {0: 3.0, 1: 3.0}, False, 0),
        ({0: 3.0, 1: 3.004}, {0: 3.0, 1: 3.0}, False, 1),
        ({0: 2.0, 1: 3.006}, {0: 3.0, 1: 3.0}, True, 1),
        ({0: 3.5, 1: 3.2}, {0: 3.0, 1: 3.0}, True, 0),
        ({0: 2.5, 1: 2.8}, {0: 3.0, 1: 3.0}, False, 1),
        ({0: NAN, 1: 3.0}, {0: 3.0, 1: 3.0}, True, 0),
        ({0: 3.0, 1: 3.0}, {0: 3.0, 1: NAN}, False, 0),
        ({0: 3.0, 1: 3.0}, {0: NAN, 1: NAN}, False, 0),
    ],
)
def test_the_cluster_that_loses_most_decides(
    merged: dict[int, float | None], apart: dict[int, float | None], kept: bool, cluster: int
) -> None:
    found = keep_apart(figures(merged), figures(apart), count=2)
    assert (found.kept_apart, found.cluster, found.documents) == (kept, cluster, MANY)
    np.testing.assert_equal((found.merged, found.apart), (merged[cluster], apart[cluster]))
    assert found.limit == LOST_BY_MERGING == 0.005
    asked = keep_apart(figures(merged), figures(apart), count=2, asked=True)
    assert (asked.kept_apart, asked.cluster) == (True, cluster)


def test_a_cluster_without_documents_does_not_count_and_is_named() -> None:
    found = keep_apart(figures({0: 3.0, 3: 3.1}), figures({0: 3.0, 3: 3.1}), count=4)
    assert (found.kept_apart, found.unmeasured) == (False, [1, 2])
    note = apart_note(EvaluationRecord(apart=found))
    assert str(note).endswith("; clusters without a validation document were not compared: 1, 2")
    for asked in (False, True):
        nothing = keep_apart([], [], count=2, asked=asked)
        assert (nothing.kept_apart, nothing.cluster, nothing.unmeasured) == (asked, None, [0, 1])


MERGED = "the sub-models are merged: the merged model"
APART = "the sub-models stay apart: merged, the model"
ASKED = "the sub-models stay apart, as export.keep_apart asks: merged, the model"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kept_apart": True, "cluster": 2, "merged": 3.31}, f"{APART} is 0.31 nats worse on cluster 2"),
        ({"kept_apart": True, "asked": True, "merged": 2.75}, f"{ASKED} is 0.25 nats better on cluster 1"),
        ({"kept_apart": True, "asked": True, "merged": 3.25}, f"{APART} is 0.25 nats worse on cluster 1"),
        (
            {"kept_apart": False, "merged": 3.002},
            f"{MERGED} is 0.0020 nats worse on cluster 1, where it does worst, and 0.005 nats are allowed",
        ),
        (
            {"kept_apart": True, "merged": NAN, "documents": 4},
            f"{APART} has no loss that is a number on cluster 1; the cluster has only 4 validation documents",
        ),
        ({"kept_apart": False, "cluster": None}, "the sub-models are merged: no cluster has a validation document"),
        ({"kept_apart": True, "asked": True, "cluster": None}, "the sub-models stay apart: as export.keep_apart asks"),
    ],
)
def test_a_sentence_says_what_was_decided_and_why(record: dict[str, Any], words: str) -> None:
    found = ApartRecord.model_validate(
        {"limit": LOST_BY_MERGING, "documents": MANY, "cluster": 1, "apart": 3.0, **record}
    )
    assert apart_note(EvaluationRecord(apart=found)) == words


def test_the_figures_of_the_result_are_those_of_what_was_chosen() -> None:
    measured: dict[str, Any] = {
        "loss": 3.5,
        "documents": 9,
        "xz_bits_per_byte": 2.0,
        "ensemble": {"loss": 3.0, "documents": 9, "clusters": [{"cluster": 0, "loss": 3.0}]},
        "start": {"loss": 3.2},
        "routers": [{"layer": 0, "load": [1.0]}],
    }
    old = EvaluationRecord.model_validate(measured)
    assert of_result(old) is old, "before there was a choice, the merged model was the result"
    assert apart_note(old) is None
    for kept, loss in ((False, 3.5), (True, 3.0)):
        record = {**measured, "apart": {"kept_apart": kept, "limit": LOST_BY_MERGING}}
        result = of_result(EvaluationRecord.model_validate(record))
        assert (result.loss, result.start and result.start.loss, result.xz_bits_per_byte) == (loss, 3.2, 2.0)
        assert (len(result.routers), result.is_empty) == (not kept, False)
        rows = [name for name, _ in evaluation_rows(EvaluationRecord.model_validate(record))]
        assert rows == ["all, merged" if kept else "all", "all, with the start model", "sub-models as an ensemble"]
    assert math.isclose(old.ensemble.clusters[0].loss if old.ensemble else 0.0, 3.0)
