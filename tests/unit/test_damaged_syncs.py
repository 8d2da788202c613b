"""Damage in the sync points of an interrupted stage: it is found when the run continues, and repaired."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from damaged_runs import Finished, flip_bit, lose_page, results, resumed
from pinned_runs import config_of
from test_damaged_elsewhere import again
from test_damaged_runs import invoke

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_damage import damage_of
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.manifests import CODED, COMBINED, MEMBERS, SYNCED
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Results are the same bits with the same number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def often_synced(home: Path, **changes: object) -> RunConfig:
    config = config_of("qwen3_moe", home)
    return config.model_copy(update={"submodels": config.submodels.model_copy(update={"sync_every": 2, **changes})})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return results(pipeline.run(often_synced(tmp_path_factory.mktemp("undisturbed")), backend=LocalBackend()))


def interrupt(config: RunConfig, home: Path) -> Finished:
    """Stop a run after two sync points, when one of its sub-models has reached the third and another has not."""
    stop = StopFile(home / "stop")
    synced: list[Event] = []
    trained: list[str | None] = []

    def listen(event: Event) -> None:
        if event.stage == "submodels" and event.type == "sync":
            synced.append(event)
        if event.stage == "submodels" and event.type == "progress" and len(synced) == 2:
            trained.append(event.unit)
            if event.unit != trained[0]:
                stop.request("cancelled")

    with pytest.raises(RunStopped):
        pipeline.run(config, (listen,), backend=LocalBackend(), stop=stop)
    return Finished.of(config, home)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("interrupted")
    return interrupt(often_synced(home), home)


def sync_files(made: Finished) -> list[Path]:
    return sorted(
        path.relative_to(made.copy) for path in made.copy.glob("checkpoints/submodels-*/sync/**/*") if path.is_file()
    )


def one_of(made: Finished, kind: str) -> Path:
    """A file of the newest sync point that has one of this kind."""
    return [path for path in sync_files(made) if kind in str(path)][-1]


def test_each_damaged_file_of_a_sync_point_is_named(interrupted: Finished) -> None:
    interrupted.restore()
    files = sync_files(interrupted)
    assert {path.name if path.name == SYNCED else path.parts[4] for path in files} == {*COMBINED, MEMBERS, SYNCED}
    for path in files:
        lose_page(interrupted.directory / path)
        damaged = [f"{part.folder}/{name}" for part in damage_of(interrupted.directory) for name in part.damaged]
        assert damaged == [str(path)]
        shutil.copy2(interrupted.copy / path, interrupted.directory / path)


def test_each_damaged_file_of_codes_is_named(tmp_path: Path) -> None:
    made = interrupt(often_synced(tmp_path, sync_bits=4), tmp_path)
    files = sync_files(made)
    folders = {path.name if path.name == SYNCED else path.parts[4] for path in files}
    assert folders == {*COMBINED, *CODED, MEMBERS, SYNCED}
    for path in files:
        flip_bit(made.directory / path)
        damaged = [f"{part.folder}/{name}" for part in damage_of(made.directory) for name in part.damaged]
        assert damaged == [str(path)]
        shutil.copy2(made.copy / path, made.directory / path)


@pytest.mark.slow
def test_no_sync_point_changes_the_model_silently(interrupted: Finished, undisturbed: dict[str, object]) -> None:
    """A flipped bit, then a lost page, in a file of every kind that is read again, at the same time.

    Before (6beb2cb9): no file was named; the run trained on the damaged weights, until a gradient was infinite at step
    5.
    """
    interrupted.restore()
    read = [one_of(interrupted, kind) for kind in ("common/0", "common/layout", "momentum/0", ".bin", SYNCED)]
    said = resumed(interrupted, read, (flip_bit, lose_page))
    assert results(interrupted.directory) == undisturbed
    assert all(len(sentences) == 2 for sentences in said.values()), said
    assert all("it is not what stage submodels wrote" in each for sentences in said.values() for each in sentences)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["common/0", "common/layout", "momentum/0", "sync.json"])
def test_a_stage_with_damaged_sync_points_is_made_again_from_its_start(
    interrupted: Finished, undisturbed: dict[str, object], kind: str
) -> None:
    interrupted.restore()
    damaged = one_of(interrupted, kind)
    flip_bit(interrupted.directory / damaged)
    name = "/".join(damaged.parts[3:])
    code, output = invoke("verify", interrupted.directory)
    assert (code, f"submodels, sync points: damaged: {name}" in output) == (1, True), output
    events = again(interrupted.config, repairs=True)
    assert f"damaged: {name} of the sync points of stage submodels; the stage is made again from its start" in [
        event.data["message"] for event in events if event.type == "warning"
    ]
    assert next(event.data["step"] for event in events if event.type == "progress") == 1
    assert next(event.data["sync"] for event in events if event.type == "sync") == 1
    assert results(interrupted.directory) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".bin", ".json"])
def test_what_a_member_wrote_is_written_again_from_its_checkpoint(
    interrupted: Finished, undisturbed: dict[str, object], kind: str
) -> None:
    interrupted.restore()
    damaged = next(path for path in sync_files(interrupted) if path.parent.name == MEMBERS and path.suffix == kind)
    flip_bit(interrupted.directory / damaged)
    events = again(interrupted.config, repairs=True)
    assert (
        f"damaged: {'/'.join(damaged.parts[3:])} of the sync points of stage submodels; their members write them again"
        in [event.data["message"] for event in events if event.type == "warning"]
    )
    assert next(event.data["sync"] for event in events if event.type == "sync") == 3
    assert results(interrupted.directory) == undisturbed


@pytest.mark.slow
def test_checkpoints_elsewhere_do_not_outlive_the_sync_points_that_they_know(
    tmp_path: Path, undisturbed: dict[str, object]
) -> None:
    """The repair deletes nothing in a storage; each training discards its own checkpoints there."""
    config = often_synced(tmp_path)
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"storage": str(tmp_path / "storage")})}
    )
    made = interrupt(config, tmp_path)
    flip_bit(made.directory / one_of(made, "common/0"))
    again(config, repairs=True)
    assert results(config.directory) == undisturbed
