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
import yaml
from card_standin import write_torch
from cluster_files import FOLDER, load

from moedisco_ray.plan.cluster_file import ClusterMetadata

BIN = Path(sys.executable).parent
SCRIPTS = sorted(FOLDER.rglob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        [BIN / "shellcheck", "--external-sources", "--source-path=SCRIPTDIR", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    "script", ["local-fake.sh", "node/head.sh", "node/worker.sh", "node/follow_head.sh", "node/stop.sh"]
)
def test_whatever_starts_or_asks_ray_does_so_with_the_token(script):
    assert re.search(r'^source "\$.*environment\.sh"$', (FOLDER / script).read_text(), re.MULTILINE)
    said = subprocess.run(
        ["bash", "-c", f"source {FOLDER}/node/environment.sh && echo $RAY_AUTH_MODE"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "token\n"


@pytest.mark.parametrize("host", ["", "head.example"])
def test_the_head_lets_machines_join_if_it_has_an_address_for_them(tmp_path, host):
    node = shutil.copytree(FOLDER / "node", tmp_path / "moedisco" / "cluster_yaml" / "node")
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for script in (node / "keep.sh", *(stubs / name for name in ("ray", "moedisco"))):
        script.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/{script.name}.log\n')
        script.chmod(0o755)
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "MOEDISCO_JOIN_HOST": host,
    }
    subprocess.run(["bash", node / "head.sh", tmp_path / "shared"], env=environment, check=True)
    kept = [line for line in (tmp_path / "keep.sh.log").read_text().splitlines() if line.startswith("moedisco-join ")]
    gateway = (
        f"sudo {stubs}/moedisco join-gateway --public-host=head.example --ray-token-file={tmp_path}/.ray/auth_token"
    )
    assert kept == ([f"moedisco-join {gateway}"] if host else [])


def stubbed(folder, **scripts):
    """A search path with scripts in place of programs."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("s3://bucket/team/", ["--output-root=s3://bucket/team/runs", "--input-root=s3://bucket/team/data"]),
        ("{here}/disk", ["--output-root={here}/disk/runs", "--input-root={here}/disk/data"]),
    ],
)
def test_the_head_stores_runs_in_its_place_and_reads_what_else_it_is_given(tmp_path, place, options):
    node = shutil.copytree(FOLDER / "node", tmp_path / "moedisco" / "cluster_yaml" / "node")
    (node / "keep.sh").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >{tmp_path}/kept\n')
    environment = os.environ | {"HOME": str(tmp_path), "PATH": stubbed(tmp_path / "bin", ray="", moedisco="")}
    given = [place.format(here=tmp_path), "s3://other/text", "--max-active-runs=2"]
    subprocess.run(["bash", node / "head.sh", *given], env=environment, check=True)
    kept = (tmp_path / "kept").read_text().splitlines()
    expected = [
        *(each.format(here=tmp_path) for each in options),
        "--input-root=s3://other/text",
        "--max-active-runs=2",
    ]
    assert kept[-4:] == expected
    assert (tmp_path / "disk" / "runs").is_dir() == place.startswith("{here}")
    assert not (tmp_path / "s3:").exists()


def test_the_service_alone_gets_the_databases_password(tmp_path):
    node = shutil.copytree(FOLDER / "node", tmp_path / "moedisco" / "cluster_yaml" / "node")
    note = f'echo "$1 ${{MOEDISCO_DATABASE_URL-none}}" >>{tmp_path}/started'
    (node / "keep.sh").write_text(f"#!/bin/bash\n{note}\n")
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": stubbed(tmp_path / "bin", ray=note, moedisco=""),
        "MOEDISCO_DATABASE_URL": "postgresql://me:word@host",
    }
    subprocess.run(["bash", node / "head.sh", tmp_path / "shared"], env=environment, check=True)
    ray, service = (tmp_path / "started").read_text().splitlines()
    assert ray in ("start none", "moedisco-ray none")  # the latter where systemd keeps it
    assert service == "moedisco postgresql://me:word@host"


@pytest.mark.parametrize(
    ("mounted", "expected"),
    [
        ("/opt/dlami/nvme", "/opt/dlami/nvme/moedisco 90"),
        ("/mnt/nvme", "/mnt/nvme/moedisco 90"),
        ("none", "{home}/.cache/moedisco 50"),
    ],
)
def test_the_cache_is_on_a_local_disk_and_no_larger(tmp_path, mounted, expected):
    path = stubbed(
        tmp_path / "bin",
        mountpoint=f'[ "$2" = {mounted} ]',
        sudo=f'echo "$@" >>{tmp_path}/asked',
        df="echo 1GB-blocks; echo 100",
    )
    done = subprocess.run(
        ["bash", FOLDER / "node" / "cache_disk.sh"],
        env=os.environ | {"HOME": str(tmp_path), "USER": "me", "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == expected.format(home=tmp_path) + "\n"
    folder = Path(done.stdout.split()[0])
    assert folder.is_dir() or (tmp_path / "asked").read_text() == f"install -d -o me {folder}\n"


@pytest.mark.parametrize(
    "given", [{}, {"MOEDISCO_CACHE_GB": "7"}, {"MOEDISCO_CACHE_DIR": "/fast", "MOEDISCO_CACHE_GB": "7"}]
)
def test_a_worker_tells_its_processes_where_to_cache(tmp_path, given):
    node = shutil.copytree(FOLDER / "node", tmp_path / "moedisco" / "cluster_yaml" / "node")
    (node / "cache_disk.sh").write_text("#!/bin/bash\necho /ssd/moedisco 112\n")
    (node / "keep.sh").write_text("#!/bin/bash\n")
    path = stubbed(tmp_path / "bin", ray=f'echo "$MOEDISCO_CACHE_DIR $MOEDISCO_CACHE_GB" >{tmp_path}/told')
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MOEDISCO_")} | given
    subprocess.run(
        ["bash", node / "worker.sh", "aws"],
        env=environment | {"HOME": str(tmp_path), "PATH": path, "RAY_HEAD_IP": "10.0.0.1"},
        check=True,
    )
    size = given.get("MOEDISCO_CACHE_GB", "112")
    assert (tmp_path / "told").read_text() == f"{given.get('MOEDISCO_CACHE_DIR', '/ssd/moedisco')} {size}\n"


@pytest.fixture
def host(tmp_path):
    """Start the literal `worker.sh hosts FILE` on this machine, as a host with two GPUs; returns what it did."""
    node = shutil.copytree(FOLDER / "node", tmp_path / "moedisco" / "cluster_yaml" / "node")
    config = load("on-prem")
    config["metadata"]["moedisco"]["hosts"] = {"127.0.0.1": "high"}
    (tmp_path / "hosts.yaml").write_text(yaml.safe_dump(config))
    path = stubbed(tmp_path / "bin", ray=f'printf "%s\\n" "$@" >{tmp_path}/started', pgrep="echo 4194304")

    def start(failure):
        done = subprocess.run(
            ["bash", node / "worker.sh", "hosts", tmp_path / "hosts.yaml"],
            env=os.environ
            | {
                "HOME": str(tmp_path),
                "PATH": path.replace(":", f":{BIN}:", 1),
                "RAY_HEAD_IP": "10.0.0.1",
                "PYTHONPATH": str(write_torch(tmp_path / "torch", failure, card=1)),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        started = tmp_path / "started"
        return done, started.read_text().splitlines() if started.exists() else None

    return start


@pytest.mark.parametrize(
    ("failure", "says"),
    [("too old", "The NVIDIA driver on your system is too old"), ("missing", "Torch not compiled with CUDA enabled")],
)
def test_a_host_whose_card_torch_cannot_use_starts_nothing_and_says_why(host, failure, says):
    """Before (a0c02aba): `ray start --num-gpus=2` ran, with exit code 0."""
    done, started = host(failure)
    assert (started, done.returncode) == (None, 2), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("moedisco: GPU: 2: torch cannot use card 1 (NVIDIA L4) of node ")
    assert says in line
    assert "install a driver there that fits torch's CUDA" in line


def test_a_host_whose_cards_work_joins(host):
    done, started = host("fine")
    assert done.returncode == 0, done.stderr
    assert started[:2] == ["start", "--address=10.0.0.1:6379"]
    assert "--num-gpus=2" in started


def test_hadolint_finds_nothing():
    done = subprocess.run([BIN / "hadolint", FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_unprivileged_and_says_how_it_is():
    text = (FOLDER / "Dockerfile").read_text()
    assert "\nUSER 1000\n" in text
    assert "\nHEALTHCHECK " in text
    assert "RUN pip install --require-hashes --only-binary=:all: --requirement requirements.txt\n" in text
    assert [line for line in text.splitlines() if "pip install" in line][1:] == [
        "RUN pip install --no-index --no-deps --no-build-isolation ."
    ]


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
        "--node-ip-address=192.168.0.12",
        '--resources={"high_mem_gpu": 2}',
        "--labels=moedisco/pool=high_memory,moedisco/market=own,moedisco/gpu=A100-80GB",
        "--num-cpus=0",
        "--num-gpus=2",
    ]


def test_a_host_that_the_file_does_not_name_is_told_so(host_tags):
    metadata = ClusterMetadata.model_validate(load("on-prem")["metadata"]["moedisco"])
    with pytest.raises(SystemExit, match=r"has no entry for this host's addresses: 10\.0\.0\.9"):
        host_tags.arguments(metadata, {"10.0.0.9"})


def test_this_host_has_an_address(host_tags):
    assert "127.0.0.1" in host_tags.own_addresses()
