"""The README's commands, as a new user would type them, on a smaller run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.ray_side.local import LocalRay

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (moedisco (?:init|validate|plan|run|show|plot)[^#\n]*)", README, flags=re.MULTILINE)
SERVICE_COMMANDS = re.findall(
    r"^\$ (moedisco (?:serve|estimate|submit|list|download|stop)[^#\n]*)", README, flags=re.MULTILINE
)
SMALL = [
    "corpus.sources=[{path: embedded}]",
    "tokens.total=60_000",
    "tokenizer.train_vocab_size=600",
    "model.config.hidden_size=32",
    "evaluation.max_tokens=4000",
    "clusters.count=2",
    "clusters.vectors=tfidf_svd",
    "tokens.seed_share=0",
    "pools.low_memory.max_workers=1",
]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_readmes_commands_work_in_order(tmp_path: Path) -> None:
    assert [command.split()[1] for command in COMMANDS] == ["init", "validate", "plan", "run", "show", "plot"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "disabled"
    }
    for command in COMMANDS:
        words = command.split()[1:]
        if words[0] in ("validate", "plan", "run"):
            words += [word for setting in SMALL for word in ("--set", setting)]
        done = subprocess.run(
            [sys.executable, "-m", "moedisco_ray", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert not done.stderr, (command, done.stderr)
    figures = {path.name for path in (tmp_path / "runs" / "demo" / "figures").iterdir()}
    assert figures == {"loss.png", "clusters.png", "experts.png"}


@pytest.mark.ray
@pytest.mark.chaos  # the same way as the end-to-end test, with a driver and a local Ray of its own
@pytest.mark.timeout(400)
def test_the_readmes_service_commands_work_in_order(tmp_path: Path) -> None:
    assert [command.split()[1] for command in SERVICE_COMMANDS] == [
        "serve",
        "estimate",
        "submit",
        "list",
        "download",
        "stop",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MOEDISCO_"))}
    environment |= {"XDG_CONFIG_HOME": str(tmp_path / "config"), "XDG_STATE_HOME": str(tmp_path / "state")}
    printed = {}
    try:
        for command in ["moedisco init my.yaml --preset demo", *SERVICE_COMMANDS]:
            words = command.split()[1:]
            if words[0] in ("estimate", "submit"):
                words += [word for setting in SMALL for word in ("--set", setting)]
            if words[0] == "serve":
                words.append("--port=0")  # the one that it shows may be in use here
            done = subprocess.run(
                [sys.executable, "-m", "service", *words],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            printed[words[0]] = done.stdout
    finally:
        LocalRay(tmp_path / "state" / "moedisco").stop()
    assert "succeeded" in printed["list"]
    assert (tmp_path / "demo" / "model.safetensors").exists()
    assert printed["stop"] == "The service has stopped\n"
