"""A configuration of another user runs no code before the user has read and allowed it."""

from __future__ import annotations

import json
import os
import pty
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import small_config
from typer.testing import CliRunner

from service.cli import app


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that a stranger's code makes."""
    return tmp_path / "code has run"


@pytest.fixture(autouse=True)
def _own_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "path_hooks", list(sys.path_hooks))
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("MOEDISCO_CODE_PATH", "")


def configuration(tmp_path: Path, function: str, rows: list[dict[str, str]], **changes: Any) -> Path:
    """A configuration whose only source is a table that a function changes."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(
        tmp_path / "runs",
        **{"corpus": {"sources": [{"path": str(tmp_path / "rows.jsonl"), "map": function}]}, **changes},
    )
    path = tmp_path / "stranger.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def module(folder: Path, name: str, marker: Path, code: str = "def keep(row):\n    return row\n") -> Path:
    """A module next to the configuration that makes the marker when it is imported, and then fails."""
    path = folder / f"{name}.py"
    path.write_text(f"open({str(marker)!r}, 'w').close()\n{code}raise RuntimeError('imported')\n")
    return path


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_no_command_calls_a_function_without_permission(tmp_path: Path, marker: Path, command: str) -> None:
    """`getoutput` gives the keys of a row to a shell.

    Before (af276e38): `validate` ran the shell command, then said "returns str for a row of rows.jsonl"; so did `run`.
    """
    path = configuration(tmp_path, "subprocess:getoutput", [{f"touch '{marker}'; true": "a"}])
    result = CliRunner().invoke(app, [command, str(path)])
    assert not marker.exists()
    if command != "plan":  # which reads no text
        assert result.exit_code == 2
        assert "corpus.sources.0.map: 'subprocess:getoutput': " in result.stderr
        assert result.stderr.count("\n") == 1
    if command == "run":
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["validate", "plan", "run"])
def test_no_command_imports_a_module_without_permission(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Importing a module runs it, also if the function is never called.

    Before (af276e38): `validate` and `run` imported it, and said "cannot be imported (RuntimeError: imported)".
    """
    module(tmp_path, "strangers_rows", marker)
    monkeypatch.syspath_prepend(tmp_path)
    path = configuration(tmp_path, "strangers_rows:keep", [{"text": "a"}])
    result = CliRunner().invoke(app, [command, str(path)])
    assert not marker.exists()
    if command == "run":
        assert result.exit_code == 2
        assert "--allow-code strangers_rows:keep" in result.stderr
        assert result.stderr.count("\n") == 1
    if command == "validate":
        assert result.exit_code == 0, result.stderr
        assert "strangers_rows:keep was not called" in result.stdout


def test_no_module_of_a_package_is_imported_to_find_another(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before (af276e38): `validate` imported the package, and said "cannot be imported (RuntimeError: imported)"."""
    package = tmp_path / "strangers_package"
    package.mkdir()
    module(package, "__init__", marker)
    (package / "rows.py").write_text("def keep(row):\n    return row\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = configuration(tmp_path, "strangers_package.rows:keep", [{"text": "a"}])
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert not marker.exists()
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("allowed", ["strangers_rows", "strangers_rows:keep"])
def test_what_is_allowed_is_imported_from_next_to_the_configuration(tmp_path: Path, marker: Path, allowed: str) -> None:
    module(tmp_path, "strangers_rows", marker)
    path = configuration(tmp_path, "strangers_rows:keep", [{"text": "a"}])
    result = CliRunner().invoke(app, ["run", str(path), "--allow-code", allowed])
    assert result.exit_code == 2
    assert "cannot be imported (RuntimeError: imported)" in result.stderr
    assert marker.exists()


def test_no_other_file_next_to_the_configuration_replaces_a_module_of_the_processes_that_a_run_starts(
    tmp_path: Path, marker: Path
) -> None:
    """Users saw only the function's file; the folder may also have a `queue.py`, or an honest user's `evaluate.py`.

    The folder was in PYTHONPATH, which comes before the standard library: each process of the run imported that
    `queue.py`.
    """
    (tmp_path / "strangers_rows.py").write_text("def keep(row):\n    return row\nraise RuntimeError('imported')\n")
    (tmp_path / "queue.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    path = configuration(tmp_path, "strangers_rows:keep", [{"text": "a"}])
    result = CliRunner().invoke(app, ["run", str(path), "--allow-code", "strangers_rows"])
    assert "cannot be imported (RuntimeError: imported)" in result.stderr
    subprocess.run([sys.executable, "-P", "-c", "import queue; queue.Queue()"], check=True)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["strangers_rows", "strangers.rows"])
def test_what_was_shown_is_what_runs_although_python_has_compiled_code_of_the_file(
    tmp_path: Path, marker: Path, name: str
) -> None:
    """Compiled code in `__pycache__` can claim to be valid for any source, and Python ran it instead of the file."""
    source = tmp_path / f"{name.replace('.', '/')}.py"
    source.parent.mkdir(exist_ok=True)
    source.write_text(f"open({str(marker)!r}, 'w').close()\n")
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    source.write_text("def keep(row):\n    return row\nraise RuntimeError('imported')\n")
    path = configuration(tmp_path, f"{name}:keep", [{"text": "a"}])
    result = CliRunner().invoke(app, ["run", str(path), "--allow-code", name])
    assert not marker.exists()
    assert "cannot be imported (RuntimeError: imported)" in result.stderr


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("getoutput", "from subprocess import getoutput\n"),
        ("found", "import subprocess\nfound = subprocess.getoutput\n"),
        ("inner", "def outer():\n    def inner(row):\n        return row\n"),
        ("keep", "class keep(dict):\n    pass\n"),
    ],
)
def test_a_function_that_a_module_only_imports_is_refused_although_the_module_is_allowed(
    tmp_path: Path, marker: Path, function: str, code: str
) -> None:
    """Before (af276e38): `run` had no such option, and `validate` imported the module."""
    module(tmp_path, "strangers_rows", marker, code)
    path = configuration(tmp_path, f"strangers_rows:{function}", [{"text": "a"}])
    for command in (["run", str(path), "--allow-code", "strangers_rows"], ["validate", str(path)]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2
        assert "is not defined by a `def` in" in result.stderr
    assert not marker.exists()


@pytest.mark.parametrize("function", ["subprocess:getoutput", "os:system", "builtins:exec", "importlib.util:find_spec"])
def test_no_function_of_python_itself_can_be_allowed(tmp_path: Path, function: str) -> None:
    path = configuration(tmp_path, function, [{"text": "a"}])
    result = CliRunner().invoke(app, ["run", str(path), "--allow-code", function])
    assert result.exit_code == 2
    assert "is part of Python" in result.stderr


@pytest.mark.parametrize(
    ("answer", "runs"), [("n", False), ("", False), pytest.param("y", True, marks=pytest.mark.slow)]
)
def test_a_terminal_shows_all_code_and_asks_once(tmp_path: Path, marker: Path, answer: str, runs: bool) -> None:
    hidden = "# \x1b[2J\x1b[8m \u202e hidden\n"
    package = tmp_path / "strangers"
    package.mkdir()
    (package / "__init__.py").write_text("print('importing a module runs its package')\n")
    source = module(package, "rows", marker, hidden + "def keep(row):\n    return row\n")
    path = configuration(tmp_path, "strangers.rows:keep", [{"text": "a"}])
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "service", "run", str(path), "--json"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        shown = b""
        while b"[y/N]" not in shown and (read := os.read(ours, 1 << 16)):
            shown += read
        assert not marker.exists()
        os.write(ours, f"{answer}\n".encode())
        while process.poll() is None:  # an unread terminal would stop the program
            try:
                os.read(ours, 1 << 16)
            except OSError:  # the program has closed its side
                break
        assert process.wait(60) == 2
    os.close(ours)
    text = shown.decode().replace("\r\n", "\n")
    assert str(source) in text
    assert "print('importing a module runs its package')" in text
    assert "raise RuntimeError('imported')" in text, "all of the file runs, not only the function"
    assert "\\u001b[2J\\u001b[8m \\u202e hidden" in text
    assert "\x1b[8m" not in text
    assert marker.exists() == runs
    assert (tmp_path / "runs").exists() == runs
