"""A file whose lists and mappings are thousands of levels deep is refused in one line, not in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config.presets import preset_text

DEMO = yaml.safe_load(preset_text("demo"))
FORMS = {
    "list": "[" * 5000 + "]" * 5000,
    "mapping": "{a: " * 5000 + "1" + "}" * 5000,
    "list without an end": "[" * 5000,
}
STEPS = "\n".join(f"x{i + 1}: &a{i + 1} {'[' * 90}*a{i}{']' * 90}" for i in range(20))
"""Each line is 90 levels deep and refers to the line before it."""


def refused(*arguments: str) -> str:
    """The one line in which a command refuses something."""
    ended = CliRunner().invoke(app, list(arguments))
    assert (ended.exit_code, type(ended.exception)) == (2, SystemExit)
    [line] = ended.stderr.splitlines()
    assert len(line) < 500
    return line


@pytest.mark.parametrize("command", ["plan", "validate"])
@pytest.mark.parametrize("form", FORMS)
def test_a_configuration_that_is_nested_deeply_is_refused_in_one_line(tmp_path: Path, command: str, form: str) -> None:
    """Before (af276e38): a traceback with 1000 calls that ended in RecursionError."""
    path = tmp_path / "run.yaml"
    path.write_text(f"name: x\ntags:\n  {FORMS[form]}\n")
    said = refused(command, str(path))
    assert said.endswith("more than 100 lists and mappings inside each other at line 3; write fewer levels")


def test_levels_that_a_configuration_refers_to_count(tmp_path: Path) -> None:
    """Before (af276e38): 1,800 levels were read, and a line was printed for each key of the file."""
    path = tmp_path / "run.yaml"
    path.write_text(f"{preset_text('demo')}\nx0: &a0 1\n{STEPS}\n")
    assert "more than 100 lists and mappings inside each other; write fewer levels" in refused("validate", str(path))


def test_an_override_that_is_nested_deeply_is_refused_in_one_line(tmp_path: Path) -> None:
    """Before (af276e38): a traceback that ended in RecursionError."""
    (tmp_path / "run.yaml").write_text(preset_text("demo"))
    ended = CliRunner().invoke(app, ["plan", str(tmp_path / "run.yaml"), "--set", f"tags={FORMS['list']}"])
    assert (ended.exit_code, type(ended.exception)) == (2, SystemExit)
    assert "more than 100 lists and mappings inside each other" in ended.stderr


@pytest.mark.parametrize(
    ("name", "text", "setting"),
    [
        ("tasks.jsonl", f"{FORMS['list']}\n", {"evaluation": {"lm_eval": ["tasks.jsonl"]}}),
        ("data/rows.jsonl", f"{FORMS['list']}\n", {"corpus": {"sources": [{"path": "data"}]}}),
        (
            "data/README.md",
            f"---\nconfigs: {FORMS['list']}\n---\n",
            {"corpus": {"sources": [{"path": "data", "split": "train"}]}},
        ),
        ("tokenizer.json", FORMS["list"], {"tokenizer": {"path": "."}}),
        ("config.json", FORMS["list"], {"model": {"init": {"upcycle": "."}}}),
    ],
)
def test_a_strangers_file_that_is_nested_deeply_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, setting: dict[str, Any]
) -> None:
    """Before (af276e38): a traceback that ended in RecursionError, but for `config.json`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n' * 100)
    (tmp_path / name).write_text(text)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(DEMO | setting))
    ended = CliRunner().invoke(app, ["validate", "run.yaml"])
    assert isinstance(ended.exception, SystemExit | None), repr(ended.exception)
    assert "Traceback" not in ended.output
