from __future__ import annotations

import errno
from pathlib import Path

import pytest

from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.store.artifacts import commit, is_done, read_manifest


def test_a_committed_directory_is_done_for_its_fingerprint_alone(tmp_path: Path) -> None:
    with commit(tmp_path / "stage", "a") as draft:
        (draft.path / "data").write_text("1", encoding="utf-8")
        draft.summary["tokens"] = 7
    assert is_done(read_manifest(tmp_path / "stage"), "a", {})
    assert not is_done(read_manifest(tmp_path / "stage"), "b", {})
    manifest = read_manifest(tmp_path / "stage")
    assert manifest is not None
    assert manifest.summary == {"tokens": 7}


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.EIO, "broken")])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    with commit(tmp_path / "stage", "a") as draft:
        (draft.path / "data").write_text("old", encoding="utf-8")
    with pytest.raises(type(error)), commit(tmp_path / "stage", "b") as draft:
        (draft.path / "data").write_text("half", encoding="utf-8")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    assert (tmp_path / "stage" / "data").read_text(encoding="utf-8") == "old"


def test_a_full_disk_is_one_line_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="the disk is full"), commit(tmp_path / "stage", "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_torn_line_of_events_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log(Event("stage_started", "corpus"))
    log.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"type":"prog')
    log = EventLog(path)
    log(Event("stage_finished", "corpus"))
    log.close()
    assert [event.type for event in EventLog.read(path)] == ["stage_started", "stage_finished"]
