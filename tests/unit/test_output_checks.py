"""`validate` and `run` refuse an unwritable output, or a disk with too little room, before anything starts."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.execution.output_checks import small_disks, tight_disks
from moedisco_ray.plan import build_plan

PETABYTES = "tokens.total=100000000000000"
BEFORE = "the pipeline started"


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Runs a command with settings and returns its standard error, which also shows whether a pipeline started."""
    module = types.ModuleType("moedisco_ray.execution.pipeline")

    def pipeline(*_, **__):
        sys.stderr.write(BEFORE)
        return tmp_path

    module.run = pipeline
    monkeypatch.setitem(sys.modules, "moedisco_ray.execution.pipeline", module)
    path = tmp_path / "demo.yaml"
    path.write_text(preset_text("demo"))

    def run(command, *changes):
        given_options = [option for change in (f"output={tmp_path / 'runs'}", *changes) for option in ("--set", change)]
        ended = CliRunner().invoke(app, [command, str(path), *given_options])
        assert sorted(each.name for each in tmp_path.iterdir()) == ["demo.yaml"], "something is left behind"
        return (ended.exit_code, " ".join(ended.stderr.split()))

    return run


@pytest.mark.parametrize("command", ["validate", "run"])
def test_an_output_on_a_file_system_that_refuses_it_is_refused(refused, command):
    """Permission bits and mount flags say nothing of a file system that takes no new files, such as /proc.

    Before (af276e38): `validate` said ok, and `run` started the pipeline.
    """
    code, said = refused(command, "output=/proc")
    assert code == 2
    assert "output: '/proc/demo': cannot be written: /proc refuses it (" in said
    assert BEFORE not in said


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_checkpoint_storage_that_cannot_be_made_is_refused(refused, command):
    """A folder for checkpoints is checked like the output.

    Before (af276e38): `validate` said ok, and `run` started the pipeline.
    """
    code, said = refused(command, "checkpoint.storage=/dev/null/checkpoints")
    assert code == 2
    assert "checkpoint.storage: '/dev/null/checkpoints': cannot be made: /dev/null is not a directory" in said
    assert BEFORE not in said


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_disk_with_less_room_than_planned_is_refused_with_both_numbers(refused, command):
    """A corpus of 100 trillion tokens needs petabytes.

    Before (af276e38): `validate` said ok, and `run` started the pipeline.
    """
    code, said = refused(command, PETABYTES)
    assert code == 2
    assert re.search(r"output: '\S+/runs/demo': the run needs \d{1,3}(,\d{3})+\.\d\d GB more", said)
    assert " GB more on this disk, which has " in said
    assert BEFORE not in said


CONFIG = check_config(parse_yaml(preset_text("demo")))
PLAN = build_plan(CONFIG)
_MODELS = itertools.accumulate(stage.stored for stage in PLAN.storage)
STORED = max(models + stage.checkpoints for models, stage in zip(_MODELS, PLAN.storage, strict=True))
"""Checkpoints of a stage are deleted before later stages store their models."""


@given(st.floats(0, 3))
def test_a_disk_is_refused_scarce_or_fine(share):
    free = round(share * STORED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=free))
        config = CONFIG.model_copy(update={"output": Path("/tmp/no/such/folder")})
        problems, warnings = list(small_disks(config, PLAN)), list(tight_disks(config, PLAN))
    assert (len(problems), len(warnings)) == (free < STORED, STORED <= free < 1.2 * STORED)


def test_what_an_earlier_attempt_has_stored_needs_no_room_again(tmp_path):
    config = CONFIG.model_copy(update={"output": tmp_path})
    (tmp_path / "demo").mkdir()
    with (tmp_path / "demo" / "model.safetensors").open("wb") as file:
        os.truncate(file.fileno(), STORED)  # a sparse file
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
        assert list(small_disks(config, PLAN)) == []
