"""All commands open a model in the same way: none applies an adapter that others ignore, and none reads pickled weights."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tiny_export import write_model
from typer.testing import CliRunner

from moedisco_ray.cli.app import app


class _Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def commands(model: Path, home: Path) -> dict[str, list[str]]:
    """Arguments of every command that opens a model."""
    (home / "a.txt").write_text("text " * 900)
    config = home / "run.yaml"
    config.write_text(json.dumps({
        "name": "a", "corpus": {"sources": [{"path": "embedded"}]}, "tokens": {"total": 10**6, "seed_share": 0},
        "model": {"init": {"checkpoint": str(model)}}, "output": str(home / "runs")}))
    new = ["--output", str(home / "new")]
    return {
        "chat": [str(model)], "chat from disk": [str(model), "--experts-on", "disk"],
        "evaluate": [str(model), "--sources", str(home / "a.txt")], "export": [str(model), "--to", "gguf", *new],
        "experts": [str(model), "0,1", *new], "merge": [str(model), str(model), "--base", str(model), *new],
        "push": [str(model), "org/name"], "validate": [str(config)], "plan": [str(config)], "run": [str(config)]}


COMMANDS = ["chat", "chat from disk", "evaluate", "export", "experts", "merge", "push", "validate", "plan", "run"]


def refused(command: str, model: Path, home: Path) -> str:
    done = CliRunner().invoke(app, [command.split(maxsplit=1)[0], *commands(model, home)[command]], input="hello\n")
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output + str(done.exception)
    return done.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_next_to_an_adapter_is_refused_by_every_command(tmp_path: Path, command: str) -> None:
    """Protects users from two models in one directory.

    Before (af276e38): no command said anything of the adapter; chat handed it to transformers, the others ignored it.
    """
    model = tmp_path / "model"
    write_model(model, "qwen3_moe")
    (model / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}))
    assert "holds an adapter of PEFT (adapter_config.json); merge it into the model first" in refused(command, model, tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", COMMANDS)
def test_pickled_weights_are_unpickled_by_no_command(tmp_path: Path, command: str) -> None:
    model = tmp_path / "model"
    write_model(model, "qwen3_moe")
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        path.rename(path.with_name(f"other-{path.name}"))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Pickled(tmp_path / "trace")))
    CliRunner().invoke(app, [command.split(maxsplit=1)[0], *commands(model, tmp_path)[command]], input="hello\n")
    assert not (tmp_path / "trace").exists()
