"""What nodes run at their start: linted, and the parts that decide something."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster_files import FOLDER, load

from moedisco_ray.plan.cluster_file import ClusterMetadata

BIN = Path(sys.executable).parent
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("node/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", script],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("script", ["local-fake.sh", "node/head.sh", "node/worker.sh", "node/follow_head.sh", "node/stop.sh"])
def test_whatever_starts_or_asks_ray_does_so_with_the_token(script):
    assert re.search(r'^source "\$.*environment\.sh"$', (FOLDER / script).read_text(), re.MULTILINE)
    said = subprocess.run(
        ["bash", "-c", f"source {FOLDER}/node/environment.sh && echo $RAY_AUTH_MODE"], capture_output=True, text=True, check=True)
    assert said.stdout == "token\n"


@pytest.mark.parametrize("host", ["", "head.example"])
def test_the_head_lets_machines_join_if_it_has_an_address_for_them(tmp_path, host):
    node = shutil.copytree(FOLDER / "node", tmp_path / "moedisco" / "cluster_yaml" / "node")
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for script in (node / "keep.sh", *(stubs / name for name in ("ray", "moedisco"))):
        script.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/{script.name}.log\n')
        script.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{stubs}:{os.environ['PATH']}", "MOEDISCO_JOIN_HOST": host}
    subprocess.run(["bash", node / "head.sh"], env=environment, check=True)
    kept = [line for line in (tmp_path / "keep.sh.log").read_text().splitlines() if line.startswith("moedisco-join ")]
    gateway = f"sudo {stubs}/moedisco join-gateway --public-host=head.example --ray-token-file={tmp_path}/.ray/auth_token"
    assert kept == ([f"moedisco-join {gateway}"] if host else [])


def test_hadolint_finds_nothing():
    done = subprocess.run([BIN / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_unprivileged_and_says_how_it_is():
    text = (FOLDER / "Dockerfile").read_text()
    assert "\nUSER 1000\n" in text
    assert "\nHEALTHCHECK " in text
    assert "RUN pip install --require-hashes --only-binary=:all: --requirement requirements.txt\n" in text
    assert [line for line in text.splitlines() if "pip install" in line][1:] == [
        "RUN pip install --no-index --no-deps --no-build-isolation ."]


@pytest.fixture(scope="module")
def host_tags():
    spec = importlib.util.spec_from_file_location("host_tags", FOLDER / "node" / "host_tags.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_host_gets_the_tags_that_the_file_has_for_it(host_tags):
    metadata = ClusterMetadata.model_validate(load("on-prem")["metadata"]["moedisco"])
    arguments = host_tags.arguments(metadata, {"127.0.0.1", "192.168.0.12"})
    assert arguments == [
        "--node-ip-address=192.168.0.12", '--resources={"high_mem_gpu": 2}',
        "--labels=moedisco/pool=high_memory,moedisco/market=own,moedisco/gpu=A100-80GB", "--num-cpus=0", "--num-gpus=2"]


def test_a_host_that_the_file_does_not_name_is_told_so(host_tags):
    metadata = ClusterMetadata.model_validate(load("on-prem")["metadata"]["moedisco"])
    with pytest.raises(SystemExit, match=r"has no entry for this host's addresses: 10\.0\.0\.9"):
        host_tags.arguments(metadata, {"10.0.0.9"})


def test_this_host_has_an_address(host_tags):
    assert "127.0.0.1" in host_tags.own_addresses()
