"""A tiny finished run whose files tests damage: its directory is put back from a copy before each damage."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from pinned_runs import config_of

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.stages import STAGES
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

PAGE = 4096
FOLDERS = [stage.directory for stage in STAGES]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A tiny run, and an untouched copy of its directory."""

    config: RunConfig
    copy: Path

    @property
    def directory(self) -> Path:
        return self.config.directory

    def restore(self) -> None:
        shutil.rmtree(self.directory)
        shutil.copytree(self.copy, self.directory)

    def remove_after(self, folder: str) -> None:
        for later in FOLDERS[FOLDERS.index(folder) + 1:]:
            shutil.rmtree(self.directory / later)


@contextlib.contextmanager
def finished_run(home: Path) -> Iterator[Finished]:
    """Make the run below a folder, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = config_of("qwen3_moe", home)
    shutil.copytree(pipeline.run(config, backend=LocalBackend()), home / "copy")
    yield Finished(config, home / "copy")
    torch.set_num_threads(threads)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def lose_page(path: Path) -> None:
    """Zero a page, as a disk that lost power before it wrote the page leaves it."""
    content = bytearray(path.read_bytes())
    start = PAGE * random.Random(path.name).randrange(-(-len(content) // PAGE))
    while not any(content[start:start + PAGE]):
        start -= PAGE
    content[start:start + PAGE] = bytes(len(content[start:start + PAGE]))
    path.write_bytes(content)


def results(directory: Path) -> dict[str, object]:
    evaluation = json.loads((directory / "evaluation" / "evaluation.json").read_text())
    weights = {path.name: path.read_bytes() for path in (directory / "model").glob("*.safetensors")}
    return {"perplexity": evaluation["perplexity"], **weights}
