"""The lock file of the nodes' packages, and the script that installs from it."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
from cluster_files import FOLDER, ROOT
from hosts import packages_stamp
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TEXT = (FOLDER / "node" / "requirements.txt").read_text()
LOCKED = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", TEXT, re.MULTILINE))
"""Version of each locked package, by canonical name."""
EXTRAS = ("postgresql", "aws", "gcp", "azure", "nodes")


def declared():
    """What pyproject.toml says that a node needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [each for each in map(Requirement, lines) if each.name != project["name"]]


def applies(requirement, extras):
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def test_every_line_is_a_version_or_its_hash():
    entries = re.split(r"\n(?=[^ #])", TEXT.split("\n", 2)[2])
    assert len(entries) == len(LOCKED) > 100
    for entry in entries:
        first, *hashes = entry.strip().split(" \\\n    ")
        assert re.fullmatch(r"[a-z0-9.-]+==[\w.]+", first)
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes)


def test_the_lock_holds_what_the_project_declares():
    for requirement in declared():
        assert requirement.specifier.contains(LOCKED[canonicalize_name(requirement.name)], prereleases=True), (
            requirement
        )


def test_the_lock_is_closed_and_has_the_versions_that_the_tests_run_with():
    seen, queue = {}, [(canonicalize_name(each.name), tuple(sorted(each.extras))) for each in declared()]
    while queue:
        name, extras = queue.pop()
        if extras in seen.setdefault(name, set()):
            continue
        seen[name].add(extras)
        assert name in LOCKED, f"`make lock` would add {name}"
        try:
            installed, needed = version(name), requires(name) or ()
        except PackageNotFoundError:  # of a cloud, or of another build of torch
            continue
        assert installed.split("+")[0] == LOCKED[name], f"`make lock` would change {name}"
        queue += [
            (canonicalize_name(each.name), tuple(sorted(each.extras)))
            for each in map(Requirement, needed)
            if applies(each, extras)
        ]
    assert {"ray", "torch", "transformers", "numpy", "pydantic"} <= seen.keys()


@pytest.fixture
def node(tmp_path):
    """A home with the files that the launcher copies, where each program of install.sh records its arguments."""
    project = tmp_path / "moedisco"
    shutil.copytree(FOLDER, project / "cluster_yaml", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("moedisco_ray", "service"):
        (project / part).mkdir()
        (project / part / "__init__.py").touch()
    (project / "pyproject.toml").touch()
    for place in (project / ".venv" / "bin", tmp_path / "bin"):
        place.mkdir(parents=True)
    programs = [project / ".venv" / "bin" / name for name in ("pip", "python")]
    programs += [tmp_path / "bin" / name for name in ("aws", "gcloud", "azcopy")]
    for path in programs:
        result = "true" if path.name == "pip" else f"[ ! -e {tmp_path}/broken ]"
        path.write_text(f'#!/bin/bash\necho "{path.name} $*" >>{tmp_path}/log\n{result}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return tmp_path


def install(node):
    """What install.sh asks of other programs."""
    (node / "log").write_text("")
    environment = {"HOME": str(node), "PATH": f"{node}/bin{os.pathsep}/usr/bin{os.pathsep}/bin"}
    subprocess.run(
        [node / "moedisco/cluster_yaml/node/install.sh"], env=environment, capture_output=True, text=True, check=True
    )
    return (node / "log").read_text().replace(f"{node}/moedisco", "~").splitlines()


PACKAGES = (
    "pip install --quiet --require-hashes --only-binary=:all: --find-links ~/wheels "
    "--requirement ~/cluster_yaml/node/requirements.txt"
)
PROJECT = "pip install --quiet --no-index --no-deps --no-build-isolation --force-reinstall ~"


@pytest.mark.parametrize(
    ("bucket", "fetch"),
    [
        (None, []),
        ("s3://text", ["aws s3 sync --only-show-errors s3://text/wheels ~/wheels"]),
        ("gs://text", ["gcloud storage rsync gs://text/wheels ~/wheels"]),
        (
            "abfs://a.blob.core.windows.net/b",
            ["azcopy copy https://a.blob.core.windows.net/b/wheels/* ~/wheels --output-level=quiet"],
        ),
    ],
)
def test_a_node_installs_the_locked_packages_once_with_the_buckets_wheels(node, bucket, fetch):
    if bucket:
        (node / "moedisco" / "bucket").write_text(f"{bucket}\n")
    assert install(node) == [*fetch, PACKAGES, PROJECT]
    assert not (node / "moedisco" / "wheels").exists()
    assert install(node) == []
    (node / "moedisco/service/new.py").touch()
    assert install(node) == [PROJECT]


def test_a_bucket_without_wheels_is_no_error(node):
    (node / "moedisco" / "bucket").write_text("s3://text\n")
    (node / "broken").touch()
    assert install(node)[-2:] == [PACKAGES, PROJECT]


def test_a_baked_image_installs_no_packages(node):
    packages_stamp(node / "moedisco" / ".venv").touch()
    assert install(node) == [PROJECT]


def test_uvs_entry_can_be_cut_out_of_the_lock():
    command = ["sed", "-n", r"/^uv==/,/[^\\]$/p", FOLDER / "node" / "requirements.txt"]
    cut = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"uv==\S+ \\\n(    --hash=\S+ \\\n)*    --hash=\S+\n", cut)
    script = (FOLDER / "node" / "install.sh").read_text()
    assert r"sed -n '/^uv==/,/[^\\]$/p'" in script
