"""GGUF files as starts: each machine writes such a file as a Hugging Face directory, once, into its cache.

`stages.export.gguf_file` does the reverse.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.locations import Location, cache_directory
from moedisco_ray.core.read_roots import confinement

_PACKAGES = ("gguf", "accelerate")
"""Packages that transformers needs to read a GGUF file; the first also writes them."""
_CONVERSION = 2
"""Number of this way to convert a file; directories in the cache of another way are not used."""


def is_gguf(place: Location) -> bool:
    """Whether a place is named as a GGUF file."""
    return isinstance(place, Path) and place.suffix == ".gguf"


def gguf_directory(setting: str, file: Path) -> Path:
    """The Hugging Face directory of a GGUF file in this machine's cache, written on first use. The weights are dequantised to fp32.

    Args:
        setting: Setting that names the file; errors name it.
        file: The GGUF file.

    Raises:
        CheckpointError: The file cannot be read, a package is missing, or this process may only read certain directories.
    """
    if confinement() is not None:
        raise CheckpointError(setting, str(file), "is a GGUF file, which a control service does not read; name a directory")
    try:
        found = file.stat()
    except OSError as error:
        raise CheckpointError(setting, str(file), f"cannot be read ({error.strerror}); name an existing file") from error
    identity = f"{_CONVERSION} {file.resolve()} {found.st_size} {found.st_mtime_ns}"
    directory = cache_directory() / "gguf" / f"{file.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if not directory.exists():
        _write(setting, file, directory)
    return directory


def check_packages(setting: str, value: str) -> None:
    """Check that the packages for GGUF files are installed.

    Args:
        setting: Setting or option that needs the packages; errors name it.
        value: Its value.

    Raises:
        CheckpointError: A package is not installed.
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise CheckpointError(setting, value, f"needs the package {missing[0]}; pip install 'moedisco-ray[gguf]'")


def _write(setting: str, file: Path, directory: Path) -> None:
    check_packages(setting, str(file))
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".draft-") as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        command = [sys.executable, "-P", "-m", "moedisco_ray.models.gguf", str(file.absolute()), str(draft)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            kind, _, reason = last.partition(": ")
            if kind.endswith(CheckpointError.__name__):
                raise CheckpointError(setting, str(file), reason)
            raise CheckpointError(setting, str(file), f"is no GGUF file that transformers can read ({reason or last})")
        try:
            draft.rename(directory)
        except OSError:
            if not directory.exists():      # otherwise another process has written it meanwhile
                raise
