"""A stage is one room: few calls lie between the sequence of stages and the function that computes."""

from __future__ import annotations

import traceback
from pathlib import Path

import pinned_runs
import pytest

from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.stages.merge import stage as merge

OWN = Path(pipeline.__file__).parents[1]
MOST = 8
"""One of them fetches, verifies and publishes the files that the function reads and writes."""


class Reached(Exception):  # noqa: N818  # not an error
    """The function that computes was called."""


def test_the_merge_is_at_most_eight_frames_away_from_the_sequence_of_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise Reached

    monkeypatch.setattr(merge, "build_merged", stop)
    with pytest.raises(Reached) as reached:
        pipeline.run(pinned_runs.config_of("qwen3_moe", tmp_path), backend=LocalBackend())
    own = [frame for frame in traceback.extract_tb(reached.tb) if Path(frame.filename).is_relative_to(OWN)]
    start = max(i for i, frame in enumerate(own) if Path(frame.filename).name == "stage_sequence.py")
    called = [frame.name for frame in own[start:]]
    assert called[0] == "_make"
    assert called[-1] == "merge_submodels"
    assert len(called) + 1 <= MOST  # and `build_merged` itself
