"""`make` finds an interpreter that the dependencies allow, whatever else is on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = """#!/bin/sh
[ "$1" = -c ] && exec {real} -c "import sys; sys.version_info = {version}
$2"
echo "${{0##*/}} $*" > made_by
mkdir -p .venv/bin && cp {true} .venv/bin/python
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory with the Makefile, and `path/` as the only folder of the search path."""
    for name in ("Makefile", "pyproject.toml", "cluster_yaml/node/requirements.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "path").mkdir()
    for tool in ("mkdir", "cp", "sed", "touch"):
        (tmp_path / "path" / tool).symlink_to(program(tool))
    return tmp_path


def program(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, name
    return found


def install(clone: Path, name: str, content: str) -> None:
    path = clone / "path" / name
    path.write_text(content)
    path.chmod(0o755)


def interpreter(version: tuple[int, ...]) -> str:
    return INTERPRETER.format(real=sys.executable, version=version, true=program("true"))


def make(clone: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "PYTHON"))}
    return subprocess.run(
        [program("make"), ".venv/.installed"],
        cwd=clone,
        env=environment | {"PATH": str(clone / "path")},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ({"python3": (3, 12, 1)}, "python3"),
        ({"python3": (3, 10, 9), "python3.13": (3, 13, 0)}, "python3.13"),
        ({"python3": (3, 15, 0), "python3.14": (3, 14, 2)}, "python3.14"),
        ({"python3.14": (3, 14, 0), "python3.11": (3, 11, 0), "python3": (3, 12, 0)}, "python3.11"),
    ],
)
def test_the_first_interpreter_that_fits_makes_the_environment(
    clone: Path, found: dict[str, tuple[int, ...]], chosen: str
) -> None:
    for name, version in found.items():
        install(clone, name, interpreter(version))
    assert make(clone).returncode == 0
    assert (clone / "made_by").read_text() == f"{chosen} -m venv .venv\n"
    assert (clone / ".venv/.installed").exists()


def test_a_name_that_starts_no_interpreter_is_skipped(clone: Path) -> None:
    install(clone, "python3.11", "#!/bin/sh\necho 'pyenv: python3.11: command not found' >&2; exit 127\n")
    install(clone, "python3.12", interpreter((3, 12, 0)))
    done = make(clone)
    assert (clone / "made_by").read_text() == "python3.12 -m venv .venv\n"
    assert done.stderr == ""


def test_uv_brings_an_interpreter_where_no_other_fits(clone: Path) -> None:
    install(clone, "python3", interpreter((3, 9, 0)))
    install(clone, "uv", interpreter(()))
    assert make(clone).returncode == 0
    assert (clone / "made_by").read_text() == "uv venv --quiet --seed --python >=3.11,<3.15 .venv\n"


def test_one_line_says_what_is_missing(clone: Path) -> None:
    done = make(clone)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("make")] == [
        "Python 3.11 to 3.14 with venv is missing: install it (Debian: apt install python3-venv), or uv"
    ]
    assert not (clone / ".venv/.installed").exists()
