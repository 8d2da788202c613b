"""A finished run whose files tests damage: its directory, and its owners' storages, are put back before each damage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from pinned_runs import config_of

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.stages import STAGES
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

PAGE = 4096
FOLDERS = [stage.directory for stage in STAGES]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run, finished or interrupted, and untouched copies of its directory and of its owners' storages."""

    config: RunConfig
    copy: Path
    storages: Mapping[Path, Path]
    """The copy of each storage."""

    @classmethod
    def of(cls, config: RunConfig, home: Path) -> Self:
        """Copy a run to a folder."""
        storages = {Path(each.storage): home / "storages" / name for name, each in config.pools.owners.items()}
        for place, copy in {config.directory: home / "copy", **storages}.items():
            shutil.copytree(place, copy)
        return cls(config, home / "copy", storages)

    @property
    def directory(self) -> Path:
        return self.config.directory

    def restore(self) -> None:
        for place, copy in {self.directory: self.copy, **self.storages}.items():
            shutil.rmtree(place)
            shutil.copytree(copy, place)

    def remove_after(self, folder: str) -> None:
        for later in FOLDERS[FOLDERS.index(folder) + 1 :]:
            shutil.rmtree(self.directory / later)


@contextlib.contextmanager
def finished_run(home: Path, config: RunConfig) -> Iterator[Finished]:
    """Make a run below a folder, with one thread."""
    with one_thread():
        pipeline.run(config, backend=LocalBackend())
        yield Finished.of(config, home)


def pinned_run() -> contextlib.AbstractContextManager[Finished]:
    """The pinned run of qwen3_moe; see `shared_run`."""
    return shared_run(_qwen3_moe)


def _qwen3_moe(home: Path) -> RunConfig:
    return config_of("qwen3_moe", home)


@contextlib.contextmanager
def shared_run(configure: Callable[[Path], RunConfig]) -> Iterator[Finished]:
    """A run that is made once per process, and one thread; who changes its directory restores it first.

    Args:
        configure: Function that writes what the run reads below a folder, and returns its configuration.
    """
    with one_thread():
        _, made = _made(configure)
        yield made


@functools.cache
def _made(configure: Callable[[Path], RunConfig]) -> tuple[tempfile.TemporaryDirectory[str], Finished]:
    home = tempfile.TemporaryDirectory()
    with finished_run(Path(home.name), configure(Path(home.name))) as made:
        return home, made  # the folder exists as long as its object does


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = random.Random(path.name).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def lose_page(path: Path) -> None:
    """Zero a page (of a small file, all of it), as a disk that lost power before it wrote the page leaves it."""
    content = bytearray(path.read_bytes())
    start = PAGE * random.Random(path.name).randrange(-(-len(content) // PAGE))
    while not any(content[start : start + PAGE]):
        start -= PAGE
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    path.write_bytes(content)


@dataclasses.dataclass(frozen=True)
class Tried:
    """What became of the damaged files of a run that was continued.

    Attributes:
        said: The errors that named each file that was found, one per harm, by the file's path in the run directory.
        unnoticed: The other files, which stayed damaged until the run ended.
        is_same: Whether the run made the same model in the end.
    """

    said: Mapping[str, Sequence[str]]
    unnoticed: Sequence[str]
    is_same: bool


def continued(made: Finished, folder: str, paths: Sequence[Path], harms: Sequence[Callable[[Path], None]]) -> Tried:
    """Continue a run after a stage, with the first harm done to all these files at once.

    The file that an error names is put back, the next harm is done to it, and the run continues, until it ends. So each
    stage is made again once, with all damage in place that was not found until then: none of it may change the result,
    not even that of a file that is found later.
    """
    made.restore()
    made.remove_after(folder)
    said = resumed(made, paths, harms)
    return Tried(
        {name: errors for name, errors in said.items() if errors},
        [name for name, errors in said.items() if not errors],
        results(made.directory) == results(made.copy),
    )


def resumed(made: Finished, paths: Sequence[Path], harms: Sequence[Callable[[Path], None]]) -> dict[str, list[str]]:
    """Continue a run whose directory is like the copy to its end, as `continued` does; return findings per file."""
    for path in paths:
        harms[0](made.directory / path)
    said: dict[str, list[str]] = {str(path): [] for path in paths}
    while True:
        try:
            pipeline.run(made.config, backend=LocalBackend())
        except DamagedError as error:
            if len(said.get(error.file, harms)) == len(harms):  # not damaged, or not any more
                raise
            said[error.file].append(str(error))
            shutil.copy2(made.copy / error.file, made.directory / error.file)
            for harm in harms[len(said[error.file]) :][:1]:
                harm(made.directory / error.file)
        else:
            return said


def flip_and_lose(path: Path) -> None:
    flip_bit(path)
    lose_page(path)


def results(directory: Path) -> dict[str, object]:
    evaluation = json.loads((directory / "evaluation" / "evaluation.json").read_text())
    weights = {path.name: path.read_bytes() for path in (directory / "model").glob("*.safetensors")}
    return {"perplexity": evaluation["perplexity"], **weights}
