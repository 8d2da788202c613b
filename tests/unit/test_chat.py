"""`moedisco chat`: answers token by token, in the model's template, and what Ctrl-C and an empty line do."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_export import write_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.cli.chat import Chat, converse
from moedisco_ray.cli.console import output_console
from moedisco_ray.cli.expert_use import ExpertUse
from moedisco_ray.core.config import FAMILIES
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.hf import routers

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    write_model(found, "qwen3_moe", max_position_embeddings=8192)
    return found


@pytest.fixture
def model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def chat_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: str | None, max_tokens: int = 8
) -> Chat:
    tokenizer.chat_template = template
    return Chat(model, tokenizer, max_tokens=max_tokens, temperature=0)


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int], count: int) -> str:
    """The likeliest continuation, without a cache."""
    found = list(ids)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
        if found[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(found[len(ids) :], skip_special_tokens=True)


def typed(*lines: str | type[BaseException]) -> Callable[[], str]:
    """Someone who types lines, presses Ctrl-C (KeyboardInterrupt), and then leaves with Ctrl-D."""
    left: Iterator[str | type[BaseException]] = iter(lines)

    def read() -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_a_chat_sees_what_was_said_before(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(model, tokenizer, TEMPLATE)
    first = greedy(model, tokenizer, tokenizer("user: the fox\nassistant: ")["input_ids"], 8)
    assert chat.answer("the fox") == first
    second = greedy(
        model, tokenizer, tokenizer(f"user: the fox\nassistant: {first}\nuser: dog\nassistant: ")["input_ids"], 8
    )
    assert chat.answer("dog") == second
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2


def test_without_a_template_each_line_begins_a_document(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    chat = chat_of(model, tokenizer, None)
    expected = greedy(model, tokenizer, [tokenizer.eos_token_id, *tokenizer("def f")["input_ids"]], 8)
    assert [chat.answer("def f"), chat.answer("def f")] == [expected, expected]
    assert not chat.messages


def test_a_long_chat_forgets_its_beginning(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.config.max_position_embeddings = 64
    chat = chat_of(model, tokenizer, TEMPLATE)
    for word in ("the quick brown fox", "jumps over", "the lazy dog", "and it's 12345 times"):
        chat.answer(word)
        assert len(tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True)["input_ids"]) <= 64 - 8
    assert chat.messages[-2]["content"] == "and it's 12345 times"
    assert chat.messages[0]["content"] != "the quick brown fox"


def test_a_short_models_prompt_keeps_half_of_its_positions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model.config.max_position_embeddings = 64
    ids = [tokenizer.eos_token_id, *tokenizer("the quick brown fox")["input_ids"]]
    expected = greedy(model, tokenizer, ids, 64 - len(ids))
    assert chat_of(model, tokenizer, None, max_tokens=512).answer("the quick brown fox") == expected


def test_empty_lines_and_commands_reach_no_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = chat_of(model, tokenizer, TEMPLATE)
    converse(chat, typed("", "  ", "fox", ""))
    assert [message["content"] for message in chat.messages[:1]] == ["fox"]
    assert len(chat.messages) == 2
    converse(chat, typed("/clear"))
    assert not chat.messages
    converse(chat, typed("/bye", "fox"))
    assert not chat.messages


def test_ctrl_c_twice_leaves_and_once_does_not(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = chat_of(model, tokenizer, TEMPLATE)
    converse(chat, typed(KeyboardInterrupt, "fox", KeyboardInterrupt, KeyboardInterrupt, "dog"))
    assert [message["content"] for message in chat.messages if message["role"] == "user"] == ["fox"]
    assert capsys.readouterr().out.count("(Ctrl-C again or Ctrl-D leaves)") == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_of_a_token_are_those_of_its_router(family: str, tmp_path: Path) -> None:
    write_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found: list[list[torch.Tensor]] = []
    for router in routers(model).values():
        found.append(outputs := [])
        router.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
    with torch.inference_mode(), ExpertUse(model) as use:
        model(torch.arange(5)[None])
        model(torch.arange(3)[None])
    shares_TE = use.shares()
    assert shares_TE.shape == (8, 4)
    assert torch.allclose(shares_TE.sum(1), torch.ones(8))
    with torch.inference_mode():
        model(torch.arange(5)[None])  # records nothing
    assert len(use.shares()) == 8
    if family in ("qwen3_moe", "mixtral"):  # softmax over all experts, then over the selected ones
        selected = model.config.num_experts_per_tok
        expected_TE = torch.zeros(5, 4)
        for outputs in found:
            logits_TE = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
            weight_TK, expert_TK = logits_TE.float().softmax(-1).topk(selected)
            expected_TE.scatter_add_(1, expert_TK, weight_TK / weight_TK.sum(1, keepdim=True) / len(found))
        assert torch.allclose(shares_TE[:5], expected_TE, atol=1e-6)


def test_a_chat_lists_the_experts_of_each_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = Chat(model, tokenizer, max_tokens=4, temperature=0, shows_experts=True)
    answer = chat.answer("the fox")
    printed = capsys.readouterr().out
    assert printed.startswith(f"{answer}\n")
    lines = printed.removeprefix(f"{answer}\n").removesuffix("\n").split("\n")
    assert len(lines) == 4  # three tokens that the model has read, and their mean
    assert all(re.fullmatch(r" *('.*'|\".*\"|all)(  [0-3]: \d+%)+", line) for line in lines)


def test_a_dense_model_has_no_experts_to_show() -> None:
    with pytest.raises(ConfigError, match="the model is dense"):
        ExpertUse(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
                )
            )
        )


class Terminal:
    """`moedisco chat` in a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moedisco_ray", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)
        self.seen = ""

    def until(self, condition: Callable[[str], bool]) -> str:
        """Read until the text since the last call fulfils a condition."""
        end = time.monotonic() + 200
        while not condition(self.seen):
            assert time.monotonic() < end, self.seen
            self.seen += os.read(self.ours, 1024).decode(errors="replace")
        found, self.seen = self.seen, ""
        return found

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_in_a_terminal_ctrl_c_stops_the_answer_alone(directory: Path) -> None:
    terminal = Terminal(str(directory), "--max-tokens", "8000", "--temperature", "5")
    assert terminal.until(lambda text: text.endswith("> ")).startswith(
        "The model has no chat template: it continues each line"
    )
    terminal.type("\n")
    assert terminal.until(lambda text: text.endswith("> ")).split() == [">"]
    terminal.type("the fox\n")
    terminal.until(lambda text: len(text) > 100)
    assert terminal.process.poll() is None
    terminal.process.send_signal(signal.SIGINT)
    terminal.until(lambda text: text.endswith("\r\n> "))
    terminal.type("/bye\n")
    assert terminal.process.wait(60) == 0
    os.close(terminal.ours)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda"])
@pytest.mark.parametrize("command", ["chat", "evaluate", "merge", "experts"])
def test_a_device_that_is_not_here_is_one_line(
    command: str, device: str, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    arguments = {
        "chat": [],
        "evaluate": ["--sources", "embedded"],
        "merge": ["--base", str(directory), "--output", str(tmp_path / "new")],
        "experts": ["0,1", "--output", str(tmp_path / "new")],
    }[command]
    result = CliRunner().invoke(app, [command, str(directory), *arguments, "--device", device])
    assert (result.exit_code, result.stderr) == (
        2,
        f"moedisco: --device: '{device}': no GPU is visible here; use --device cpu\n",
    )
    assert not (tmp_path / "new").exists()


def test_brackets_in_a_path_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    output_console().print("runs [old]/model")
    assert capsys.readouterr().out == "runs [old]/model\n"
