"""All commands load a model alike: none applies an adapter that others ignore, and none reads pickled weights."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
from tiny_export import write_model
from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils
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
    config.write_text(
        json.dumps(
            {
                "name": "a",
                "corpus": {"sources": [{"path": "embedded"}]},
                "tokens": {"total": 10**6, "seed_share": 0},
                "model": {"init": {"checkpoint": str(model)}},
                "output": str(home / "runs"),
            }
        )
    )
    new = ["--output", str(home / "new")]
    return {
        "chat": [str(model)],
        "chat from disk": [str(model), "--experts-on", "disk"],
        "evaluate": [str(model), "--sources", str(home / "a.txt")],
        "export": [str(model), "--to", "gguf", *new],
        "experts": [str(model), "0,1", *new],
        "merge": [str(model), str(model), "--base", str(model), *new],
        "push": [str(model), "org/name"],
        "validate": [str(config)],
        "plan": [str(config)],
        "run": [str(config)],
    }


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
    (model / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": 2,
                "target_modules": ["q_proj"],
                "base_model_name_or_path": "x",
            }
        )
    )
    assert "holds an adapter of PEFT (adapter_config.json); merge it into the model first" in refused(
        command, model, tmp_path
    )


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


CODE = """\
import pathlib
pathlib.Path({trace!r}).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PretrainedConfig):
    model_type = "qwen3_moe"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **inputs):
    return model
"""
CLASSES = {
    "config.json": {
        "AutoConfig": "strangers.Config",
        "AutoModel": "strangers.Model",
        "AutoModelForCausalLM": "strangers.Model",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["words.Tokenizer", "words.Tokenizer"]},
    "generation_config.json": {"GenerationConfig": "strangers.Config"},
}
"""Classes that a model's files ask to be loaded from the model's own code."""


@pytest.fixture(scope="module")
def of_a_stranger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A good model whose files name code of their own in every way transformers knows, and the trace of that code."""
    model = tmp_path_factory.mktemp("stranger") / "model"
    trace = model.parent / "trace"
    write_model(model, "qwen3_moe")
    (model / "custom_generate").mkdir()
    for path in ("strangers.py", "words.py", "modeling_qwen3_moe.py", "custom_generate/generate.py"):
        (model / path).write_text(CODE.format(trace=str(trace)))
    for name, classes in CLASSES.items():
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**values, "auto_map": classes}))
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin"):
        (model / name).write_bytes(pickle.dumps(_Pickled(trace)))
    return model, trace


def test_the_code_of_a_model_leaves_a_trace_where_it_is_trusted(
    tmp_path: Path, of_a_stranger: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next test would prove nothing."""
    model, trace = of_a_stranger
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for load in (AutoConfig.from_pretrained, AutoTokenizer.from_pretrained):
        load(model, trust_remote_code=True)
        assert trace.exists()
        trace.unlink()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert trace.exists()
    trace.unlink()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", [each for each in COMMANDS if each not in ("push", "run")])
def test_the_code_of_a_model_is_run_by_no_command(
    tmp_path: Path, of_a_stranger: tuple[Path, Path], command: str
) -> None:
    model, trace = of_a_stranger
    done = CliRunner().invoke(
        app, [command.split(maxsplit=1)[0], *commands(model, tmp_path)[command]], input="hello\ny\ny\n"
    )
    assert not trace.exists()
    if command in ("chat", "evaluate", "validate", "plan"):
        assert done.exit_code == 0, done.output + str(done.exception)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", ["chat", "evaluate", "validate"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_implementation", "org/kernel@0f3a"),
        ("_attn_implementation", "org/kernel"),
        ("text_config", {"experts_implementation": {"": "org/kernel:name"}}),
    ],
)
def test_a_kernel_that_a_model_names_is_not_fetched(tmp_path: Path, command: str, field: str, value: object) -> None:
    """With the package `kernels`, transformers fetches and runs it, also with `trust_remote_code=False`.

    Before (af276e38): exit code 1, ImportError: transformers asked to install `kernels`, to fetch and run the kernel.
    """
    model = tmp_path / "model"
    write_model(model, "qwen3_moe")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: value}))
    assert "names a kernel to fetch and run" in refused(command, model, tmp_path)
