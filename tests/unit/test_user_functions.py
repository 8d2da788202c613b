"""Functions of the user are found, listed and refused without running their code."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from small_run import OneCorpus, small_config

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.user_code import is_listed, user_functions
from moedisco_ray.execution import pipeline


def calling(tmp_path: Path, function: str) -> RunConfig:
    return small_config(tmp_path / "runs", corpus={"sources": [{"path": "embedded", "map": function}]})


def test_a_run_of_the_library_needs_the_same_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open({str(tmp_path / 'code has run')!r}, 'w')\ndef keep(row): return row\n"
    (tmp_path / "strangers_rows.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    config = calling(tmp_path, "strangers_rows:keep")
    for call in (lambda: pipeline.run(config, backend=OneCorpus()), lambda: pipeline.is_finished(config)):
        with pytest.raises(ConfigError, match="--allow-code strangers_rows:keep"):
            call()
    assert not (tmp_path / "code has run").exists()


def test_a_list_names_functions_modules_and_packages() -> None:
    assert is_listed("clean.text:keep", ["clean.text:keep"])
    assert is_listed("clean.text:keep", ["clean.text"])
    assert is_listed("clean.text:keep", ["other", "clean"])
    assert not is_listed("clean.text:keep", ["clean.text:kee", "clean.tex", "clea", "", "text", "keep", "clean:keep"])


def test_a_function_in_an_archive_is_found_and_one_in_compiled_code_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("archived_rows.py", "def keep(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path / "rows.zip")
    (found,) = user_functions(calling(tmp_path, "archived_rows:keep"), tmp_path)
    assert found.source == "def keep(row):\n    return row\n"
    assert found.folder is None
    with pytest.raises(ConfigError, match="is no Python code"):
        user_functions(calling(tmp_path, "numpy._core._multiarray_umath:array"), tmp_path)
