"""Checkpoints that the owner of their storage has changed: no planted code runs, and nothing is trained on."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import small_job, weights, write_inputs

import moedisco_ray
import service
from moedisco_ray.core.errors import StorageError
from moedisco_ray.models import check_same
from moedisco_ray.training import TrainJob, TrainResult, World, train
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.manifest import Checksum, HashingStream

STEPS = 6
EVERY = 2
FILES = range(4)
"""A checkpoint's files, by their place in its sorted listing."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    write_inputs(home)
    return home


@pytest.fixture(scope="module")
def whole(home: Path) -> tuple[TrainJob, TrainResult]:
    """The undisturbed training."""
    job = small_job(home, home / "whole" / "out", home / "whole-steps", steps=STEPS, every=EVERY)
    return job, run(job)


@pytest.fixture
def job(home: Path, whole: tuple[TrainJob, TrainResult], tmp_path: Path) -> TrainJob:
    """A training that has ended, with checkpoints of steps 4 and 6 in a storage outside its directory."""
    shutil.copytree(home / "whole-steps", tmp_path / "storage")
    shutil.copytree(home / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "out")
    return small_job(home, tmp_path / "run" / "out", tmp_path / "storage", steps=STEPS, every=EVERY)


class Planted:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self._marker,)


def run(job: TrainJob) -> TrainResult:
    return train(job, World(), lambda _event: None, lambda: False)


def newest(job: TrainJob) -> Path:
    return Path(job.checkpoints) / f"step-{STEPS:07d}"


def replace(folder: Path, index: int, data: bytes) -> None:
    """Change a file, and give the manifest the checksum of its new content."""
    name = sorted(path.name for path in folder.iterdir())[index]
    (folder / name).write_bytes(data)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = checksum_of(data).model_dump(mode="json")
        (folder / "manifest.json").write_text(json.dumps(manifest))


def checksum_of(data: bytes) -> Checksum:
    stream = HashingStream(io.BytesIO())
    stream.write(data)
    return stream.checksum


def falls_back(job: TrainJob, whole: tuple[TrainJob, TrainResult], match: str) -> None:
    """One clear error; then the training continues from the checkpoint before, as if nothing had happened."""
    with pytest.raises(StorageError, match=match):
        run(job)
    resumed = run(job)
    assert resumed.restored_step == STEPS - EVERY
    assert resumed.losses == whole[1].losses
    check_same(weights(job), weights(whole[0]))


def planted(marker: Path, form: str) -> bytes:
    if form == "pickle":
        return pickle.dumps(Planted(marker))
    saved = io.BytesIO()
    torch.save(Planted(marker), saved)
    return saved.getvalue()


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize("index", FILES)
def test_code_planted_in_any_file_of_a_checkpoint_does_not_run(
    job: TrainJob, tmp_path: Path, index: int, form: str
) -> None:
    marker = tmp_path / "ran"
    replace(newest(job), index, planted(marker, form))
    for _ in range(2):
        try:
            run(job)
        except StorageError:
            continue
    assert not marker.exists()
    pickle.loads(planted(marker, "pickle"))
    assert marker.exists()  # it would have


@pytest.mark.parametrize("index", FILES)
def test_a_changed_byte_is_refused_although_its_checksum_was_recomputed(
    job: TrainJob, whole: tuple[TrainJob, TrainResult], index: int
) -> None:
    path = sorted(newest(job).iterdir())[index]
    data = bytearray(path.read_bytes())
    # A digit of a number in JSON, so that it stays JSON; in the shards a byte of a weight.
    middle = len(data) // 2
    place = next(i for i in range(middle, len(data)) if chr(data[i]).isdigit()) if path.suffix == ".json" else middle
    data[place] ^= 1
    replace(newest(job), index, bytes(data))
    falls_back(job, whole, r"checkpoint step-0000006 in .* (was not written by this training for this step|is damaged)")


@pytest.mark.parametrize("signature", [{}, {"step": STEPS, "signature": 64 * "0"}], ids=["unsigned", "without blocks"])
def test_a_checkpoint_of_another_version_is_neither_read_nor_deleted(job: TrainJob, signature: dict[str, Any]) -> None:
    manifest = newest(job) / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    old = signature | {
        "files": {name: {"size": file["size"], "sha256": file["blocks"][0]} for name, file in files.items()}
    }
    manifest.write_text(json.dumps(old))
    with pytest.raises(
        StorageError, match=r"step-0000006 in .* was written by another version of moedisco-ray; continue it with"
    ):
        run(job)
    storage = checkpoint.storage_of(job)
    with pytest.raises(StorageError, match="another version"):
        storage.begin(STEPS + EVERY)
    assert json.loads(manifest.read_text()) == old
    storage.remove()
    assert run(job).restored_step == 0


@pytest.mark.parametrize("key", ["step", "files", "signature", "blocks"])
def test_a_flipped_bit_in_a_key_of_the_manifest_is_damage(
    job: TrainJob, whole: tuple[TrainJob, TrainResult], key: str
) -> None:
    """It says so, and the checkpoint before is used.

    Before (6beb2cb9): with "signature", "was written by another version" in every attempt; with the others, nothing was
    said.
    """
    manifest = newest(job) / "manifest.json"
    turned = chr(ord(key[0]) ^ 1) + key[1:]
    manifest.write_text(manifest.read_text().replace(f'"{key}"', f'"{turned}"', 1))
    falls_back(job, whole, r"manifest\.json of checkpoint step-0000006 in .* is damaged; the checkpoint is deleted")


def test_an_older_checkpoint_does_not_pass_for_a_newer_one(job: TrainJob, whole: tuple[TrainJob, TrainResult]) -> None:
    older = newest(job).with_name(f"step-{STEPS - EVERY:07d}")
    shutil.rmtree(newest(job))
    shutil.copytree(older, newest(job))
    falls_back(job, whole, "was not written by this training for this step")


def test_an_older_checkpoint_with_the_newer_step_in_its_manifest_does_not_pass_either(
    job: TrainJob, whole: tuple[TrainJob, TrainResult]
) -> None:
    older = newest(job).with_name(f"step-{STEPS - EVERY:07d}")
    shutil.rmtree(newest(job))
    shutil.copytree(older, newest(job))
    manifest = json.loads((newest(job) / "manifest.json").read_text())
    (newest(job) / "manifest.json").write_text(json.dumps({**manifest, "step": STEPS}))
    falls_back(job, whole, "was not written by this training for this step")


def test_a_checkpoint_of_another_training_is_refused(
    home: Path, job: TrainJob, whole: tuple[TrainJob, TrainResult], tmp_path: Path
) -> None:
    other = small_job(home, tmp_path / "other" / "out", tmp_path / "other-storage", steps=STEPS, every=EVERY)
    run(other)
    shutil.rmtree(newest(job))
    shutil.copytree(newest(other), newest(job))
    falls_back(job, whole, "was not written by this training for this step")


def test_the_key_is_in_the_run_directory_for_its_owner_alone_and_never_in_the_storage(job: TrainJob) -> None:
    key = job.key_file.read_bytes()
    assert job.key_file.is_relative_to(job.output.parent)
    assert stat.S_IMODE(job.key_file.stat().st_mode) == 0o600
    stored = [path.read_bytes() for path in Path(job.checkpoints).rglob("*") if path.is_file()]
    assert len(stored) == 2 * len(FILES)
    assert not [data for data in stored if key in data or key.hex().encode() in data]


def test_without_its_key_no_checkpoint_is_read_or_dropped(job: TrainJob) -> None:
    key = job.key_file.read_bytes()
    job.key_file.unlink()
    with pytest.raises(
        StorageError, match=r"checkpoints\.key, the key that signed .* is missing: restore it, or delete"
    ):
        run(job)
    assert checkpoint.steps(job.checkpoints) == [STEPS - EVERY, STEPS]
    job.key_file.write_bytes(key)
    assert run(job).restored_step == STEPS


def refuses_pickles(load: ast.Call) -> bool:
    safe = {"allow_pickle": False, "weights_only": True}
    return any(
        isinstance(word.value, ast.Constant) and safe.get(str(word.arg)) is word.value.value for word in load.keywords
    )


def test_no_module_can_unpickle_but_those_that_send_work_to_other_machines() -> None:
    unpicklers = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    found = set()
    for package in (moedisco_ray, service):
        root = Path(str(package.__file__)).parent
        for path in root.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            if not any(word in text for word in (*unpicklers, ".load")):
                continue
            tree = ast.parse(text)
            imported = {
                alias.name.split(".")[-1]
                for node in ast.walk(tree)
                if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in (*node.names, ast.alias(getattr(node, "module", None) or ""))
            }
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            loads = [call for call in calls if ast.unparse(call.func) in ("torch.load", "np.load", "numpy.load")]
            if imported & unpicklers or not all(map(refuses_pickles, loads)):
                found.add(str(path.relative_to(root.parent)))
    assert found == {"moedisco_ray/core/store/run_pickler.py", "moedisco_ray/core/store/run_work.py"}
