"""What stages count is reported at most once a second, and never mistaken for their end."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pinned_runs import config_of

from moedisco_ray.core.records.events import Event, EventLog, StageProgress
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from service.database.fold import Fold


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 9)), max_size=30))
def test_at_most_one_event_a_second_and_each_has_the_count_so_far(steps: list[tuple[float, int]]) -> None:
    now, done, counts = 0.0, 0, []
    emitted: list[Event] = []
    times: list[float] = []

    def emit(event: Event) -> None:
        emitted.append(event)
        times.append(now)

    progress = StageProgress(emit, "merge", "tensors", 100, clock=lambda: now)
    for seconds, count in steps:
        now, done = now + seconds, done + count
        progress.add(count)
        counts.append(done)
    assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(times))
    assert [event.data["done"] for event in emitted] == sorted({event.data["done"] for event in emitted})
    assert {event.data["done"] for event in emitted} <= set(counts)
    assert bool(emitted) == (done > 0)
    assert all(event.data | {"done": 0} == {"done": 0, "total": 100, "unit": "tensors"} for event in emitted)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_every_stage_that_does_not_train_counts_its_work(tmp_path: Path, family: str) -> None:
    directory = pipeline.run(config_of(family, tmp_path), backend=LocalBackend())
    counted = defaultdict(set)
    for event in EventLog.read(directory / "events.jsonl"):
        if event.type == "stage_progress":
            assert event.stage is not None
            total = event.data["total"]
            assert event.data["done"] > 0
            assert total is None or event.data["done"] <= total
            counted[event.stage].add(event.data["unit"])
    assert counted == {
        "corpus": {"documents read", "documents tokenized"},
        "cluster": {"vectors", "k-means restarts"},
        "merge": {"tensors merged"},
        "evaluate": {"tokens evaluated"},
        "export": {"files written"},
    }


def test_the_service_keeps_a_counting_stage_running() -> None:
    fold = Fold("run", {}, {})
    for event in (
        Event("run_started", data={"stages": ["corpus"]}, time=0.0),
        Event("stage_started", "corpus", time=1.0),
        Event("stage_progress", "corpus", data={"done": 5, "total": None, "unit": "documents read"}, time=2.0),
    ):
        fold.update(event)
    assert fold.progress["stages"]["corpus"]["status"] == "running"
    assert fold.progress["reached"]["stages"] == []
