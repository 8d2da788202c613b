"""SkyPilot's own parser reads the SkyPilot template.

It runs in an environment of its own, because SkyPilot pins older libraries than the service.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster_files import FOLDER
from typer.testing import CliRunner

from moedisco_ray.contrib.join.command import TOKEN_VARIABLE
from service.cli import app

SKYPILOT = "skypilot==0.14.1"
TEMPLATE = FOLDER / "skypilot" / "rtx4090.yaml"
_PARSE = """
import json, sys, sky
task = sky.Task.from_yaml(sys.argv[1])
found = [
    {"cloud": str(each.cloud), "accelerators": each.accelerators, "disk": each.disk_size,
     "down": each.autostop_config.down, "idle": each.autostop_config.idle_minutes}
    for each in task.resources
]
print(json.dumps({"name": task.name, "resources": found}))
"""


def test_the_template_runs_our_command_with_its_token():
    task = yaml.safe_load(TEMPLATE.read_text())
    assert task["secrets"] == {TOKEN_VARIABLE: None}
    assert f'moedisco" join - --patience=15 <<<"${TOKEN_VARIABLE}"' in task["run"], "else it is never returned"
    assert "TOKEN" in CliRunner().invoke(app, ["join", "--help"]).stdout
    assert task["resources"]["accelerators"] == {"RTX4090": 1}


@pytest.mark.parametrize("script", ["setup", "run"])
def test_its_scripts_are_such_as_shellcheck_passes(script):
    text = "#!/usr/bin/env bash\n" + yaml.safe_load(TEMPLATE.read_text())[script]
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-"], input=text, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory):
    """The interpreter of an environment with SkyPilot; the package index must be in reach."""
    venv = tmp_path_factory.mktemp("skypilot") / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "pip", "install", "--quiet", SKYPILOT], check=True)
    return venv / "bin" / "python"


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_skypilot_accepts_the_template(skypilot, tmp_path):
    def parse(path):
        return subprocess.run(
            [skypilot, "-c", _PARSE, path],
            capture_output=True,
            text=True,
            check=False,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        )

    parsed = parse(TEMPLATE)
    assert parsed.returncode == 0, parsed.stderr
    task = json.loads(parsed.stdout.splitlines()[-1])
    assert task["name"] == "moedisco-join"
    assert {each["cloud"] for each in task["resources"]} >= {"Vast", "Shadeform"}
    assert all(each["accelerators"] == {"RTX4090": 1} and each["disk"] == 150 for each in task["resources"])
    assert all(each["down"] and each["idle"] == 5 for each in task["resources"])
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(TEMPLATE.read_text().replace("disk_size:", "disk_sise:"))
    assert parse(wrong).returncode != 0
