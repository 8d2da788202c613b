"""Starts from files that hold a whole model: each machine converts one to a Hugging Face directory, in its cache.

Each machine does this once per file. `core.registry` lists the kinds of files. The program that reads a file runs in a
process of its own, so that the memory of the whole model is free again before the run begins, and so that a caller
needs no torch.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.registry import MODEL_FILES, ModelFile, missing
from moedisco_ray.core.store.locations import Location, cache_directory
from moedisco_ray.core.store.read_roots import confinement


def model_file(place: Location) -> ModelFile | None:
    """The kind of model file that a place is named as; None if it is named as another thing."""
    return MODEL_FILES.get(place.suffix) if isinstance(place, Path) else None


def directory_of(setting: str, file: Path, kind: ModelFile) -> Path:
    """The Hugging Face directory of a model file in this machine's cache, written on first use.

    Args:
        setting: Setting that names the file; errors name it.
        file: The model file.
        kind: Its kind.

    Raises:
        CheckpointError: The file cannot be read, a package is missing, or this process may only read certain
            directories.
    """
    if confinement() is not None:
        remedy = f"is a {kind.title} file, which a control service does not read; name a directory"
        raise CheckpointError(setting, str(file), remedy)
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(
            setting, str(file), f"cannot be read ({error.strerror}); name an existing file"
        ) from error
    identity = f"{kind.version} {file.resolve()} {found.st_size} {found.st_mtime_ns}"
    name = f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    directory = cache_directory() / kind.title.lower() / name
    if not directory.exists():
        _write(setting, file, kind, directory)
    return directory


def _write(setting: str, file: Path, kind: ModelFile, directory: Path) -> None:
    if (remedy := missing(kind)) is not None:
        raise CheckpointError(setting, str(file), remedy)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".draft-") as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        command = [sys.executable, "-P", "-m", kind.name, str(file.absolute()), str(draft)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            error, _, reason = last.partition(": ")
            if error.endswith(CheckpointError.__name__):
                raise CheckpointError(setting, str(file), reason)
            raise CheckpointError(
                setting, str(file), f"is no {kind.title} file that transformers can read ({reason or last})"
            )
        try:
            draft.rename(directory)
        except OSError:
            if not directory.exists():  # otherwise another process has written it meanwhile
                raise
