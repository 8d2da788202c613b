"""A bit that turns in a file of a run, or a page that is lost, is found or changes nothing: no run makes another model silently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damaged_runs import FOLDERS, PAGE, Finished, finished_run, flip_bit, lose_page, results

from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with finished_run(tmp_path_factory.mktemp("damaged")) as found:
        yield found


def files_of(copy: Path, folder: str, harm: Callable[[Path], None]) -> list[Path]:
    """One file of each kind in a stage's folder: one sub-model stands for all. Files below a page have no page to lose."""
    kinds: dict[str, Path] = {}
    for path in sorted((copy / folder).rglob("*")):
        if path.is_file() and (harm is flip_bit or path.stat().st_size > PAGE):
            kinds.setdefault(re.sub(r"/\d+/", "/K/", str(path)), path.relative_to(copy))
    return list(kinds.values())


@pytest.mark.parametrize("harm", [flip_bit, lose_page])
@pytest.mark.parametrize("folder", FOLDERS[:-1])
def test_no_file_of_a_stage_changes_the_model_silently(made: Finished, folder: str, harm: Callable[[Path], None]) -> None:
    """Every kind of file of each stage, one after the other, with the later stages to be made again.

    Before (af276e38): 18 flipped bits and 19 lost pages made another model, exit 0, in all stages but the evaluation.
    """
    wanted, said, silent = results(made.copy), dict[str, str](), list[str]()
    for path in files_of(made.copy, folder, harm):
        made.restore()
        harm(made.directory / path)
        made.remove_after(folder)
        try:
            pipeline.run(made.config, backend=LocalBackend())
        except MoeDiscoError as error:
            said[str(path)] = str(error)
        else:
            silent += [str(path)] if results(made.directory) != wanted else []
    assert not silent, "another model"
    for name, sentence in said.items():
        assert f"{name} in {made.directory} is damaged" in sentence
        assert "--repair" in sentence
    if harm is flip_bit:
        assert f"{folder}/manifest.json" in said
