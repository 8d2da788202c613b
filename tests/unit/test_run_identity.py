"""Two runs of one name stay two runs wherever their ids are used, such as in Weights & Biases."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_run import small_config
from test_tracking import Recorder

from moedisco_ray.cli.tracking import Tracking
from moedisco_ray.contrib.trackers.wandb import WeightsAndBiases
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture
def stop(tmp_path: Path) -> StopFile:
    """Ends a run as soon as it has begun."""
    stop = StopFile(tmp_path / "stop")
    stop.request("cancelled")
    return stop


def wandb_run(output: Path, stop: StopFile, given_id: str | None = None) -> tuple[str, str]:
    """Begin a run, or continue one; its id and group in Weights & Biases."""
    library = Recorder()
    config = small_config(output)
    tracking = Tracking(config, [WeightsAndBiases(config, "project", library)])
    with pytest.raises(RunStopped):
        pipeline.run(config, (tracking,), backend=LocalBackend(), stop=stop, given_id=given_id)
    [(_, _, asked)] = [call for call in library.calls if call[0] == "init"]
    return asked["id"], asked["group"]


def test_runs_of_one_name_are_two_and_a_resumed_run_is_the_same(tmp_path: Path, stop: StopFile) -> None:
    mine, yours = wandb_run(tmp_path / "mine", stop), wandb_run(tmp_path / "yours", stop)
    assert mine[0] != yours[0]
    assert [mine[1], yours[1]] == [f"small-{mine[0]}", f"small-{yours[0]}"]
    assert wandb_run(tmp_path / "mine", stop) == mine


def test_a_services_run_has_the_services_id_and_a_run_keeps_the_id_that_it_began_with(
    tmp_path: Path, stop: StopFile
) -> None:
    assert wandb_run(tmp_path, stop, "01ARZ3NDEKTSV4RRFFQ69G5FAV")[0] == "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    assert wandb_run(tmp_path, stop)[0] == "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    assert wandb_run(tmp_path, stop, "another")[0] == "01ARZ3NDEKTSV4RRFFQ69G5FAV"
