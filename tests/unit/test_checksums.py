"""Files of committed directories have checksums; whatever a disk or a copy changes in them is found."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.store.artifacts import commit, read_manifest
from moedisco_ray.core.store.checksums import with_checksum, without_checksum
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.verification import Verifier, damage_in

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    with commit(tmp_path / "seed", "f", stage="seed") as draft:
        (draft.path / "optimizer").mkdir()
        (draft.path / "optimizer" / "state").write_bytes(bytes(range(256)) * 64)
        (draft.path / "empty").touch()
        draft.summary["loss"] = 1.25
    return tmp_path / "seed"


@given(st.dictionaries(st.text().filter(lambda key: key != "checksum"), VALUES))
def test_what_is_read_back_has_the_checksum_of_what_was_written(values: dict[str, Any]) -> None:
    assert without_checksum(json.dumps(with_checksum(values), indent=2).encode()) == json.loads(json.dumps(values))


def test_every_file_of_a_committed_directory_has_a_checksum(stage: Path) -> None:
    manifest = read_manifest(stage)
    assert manifest is not None
    assert manifest.files.keys() == {"optimizer/state", "empty"}
    assert damage_in(stage) == []
    Verifier().verify(stage)


@given(place=st.integers(0, 256 * 64 * 8 - 1))
def test_any_flipped_bit_of_a_file_is_found(tmp_path_factory: pytest.TempPathFactory, place: int) -> None:
    directory = tmp_path_factory.mktemp("run") / "seed"
    with commit(directory, "f", stage="seed") as draft:
        (draft.path / "weights").write_bytes(bytes(range(256)) * 64)
    flip(directory / "weights", place)
    with pytest.raises(
        DamagedError, match=r"seed/weights in .* is damaged: it is not what stage seed wrote; .*--repair"
    ):
        Verifier().verify(directory)


def test_any_flipped_bit_of_a_manifest_is_found(stage: Path) -> None:
    whole = (stage / "manifest.json").read_bytes()
    before = read_manifest(stage)
    for place in range(0, 8 * len(whole), 7):
        flip(stage / "manifest.json", place)
        try:
            assert read_manifest(stage) == before  # a flipped bit of white space may change nothing
        except DamagedError:
            assert damage_in(stage) == ["manifest.json"]
        (stage / "manifest.json").write_bytes(whole)


def test_a_file_system_that_cannot_sync_folders_takes_runs_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those of some object storages, mounted as folders, and of Windows shares."""

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    with commit(tmp_path / "seed", "f") as draft:
        (draft.path / "state").write_bytes(b"1")
    assert damage_in(tmp_path / "seed") == []


def test_a_missing_file_is_damage(stage: Path) -> None:
    (stage / "empty").unlink()
    assert damage_in(stage) == ["empty"]


def test_a_machine_verifies_a_file_once_per_attempt_at_a_stage(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that turns a bit changes no time; so the next attempt, and another stage, verify again."""
    monkeypatch.setenv(CACHE, str(stage.parent / "cache"))
    Verifier("attempt").verify(stage)
    before = (stage / "optimizer" / "state").stat()
    with (stage / "optimizer" / "state").open("r+b") as file:
        file.write(b"x")
    os.utime(stage / "optimizer" / "state", ns=(before.st_atime_ns, before.st_mtime_ns))
    Verifier("attempt").verify(stage)
    for again in (Verifier("next"), Verifier()):
        with pytest.raises(DamagedError):
            again.verify(stage)
    (stage / "optimizer" / "state").touch()
    with pytest.raises(DamagedError):
        Verifier("attempt").verify(stage)


def test_a_link_to_a_device_is_damage_and_is_not_read(stage: Path) -> None:
    """A device has no size, as an empty file, and never ends."""
    (stage / "empty").unlink()
    (stage / "empty").symlink_to("/dev/zero")
    assert damage_in(stage) == ["empty"]


def test_without_locks_every_process_verifies(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home directory may be on a network file system."""

    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setenv(CACHE, str(stage.parent / "cache"))
    monkeypatch.setattr(fcntl, "flock", flock)
    Verifier("attempt").verify(stage)
    (stage / "optimizer" / "state").write_bytes(b"")
    with pytest.raises(DamagedError):
        Verifier("attempt").verify(stage)


def test_without_a_cache_folder_every_process_verifies(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage.parent / "file").touch()
    monkeypatch.setenv(CACHE, str(stage.parent / "file"))
    Verifier("attempt").verify(stage)
    (stage / "optimizer" / "state").write_bytes(b"")
    with pytest.raises(DamagedError):
        Verifier("attempt").verify(stage)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
