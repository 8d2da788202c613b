"""A chat template is a program of a stranger: where it takes too much time or memory, commands end in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from pathlib import Path

import psutil
import pytest
from tiny_export import write_model
from typer.testing import CliRunner, Result

from moedisco_ray.cli.app import app
from moedisco_ray.core.errors import RunError
from moedisco_ray.stages.text.given_tokens import GivenTokens
from moedisco_ray.stages.text.messages import talk_of
from tests.unit.chat_data import TURNS, conversation, write_rows, write_tokenizer

_NUMBERS = "{% for _ in range(99999) %}"
ENDLESS = _NUMBERS * 4 + "{% endfor %}" * 4 + TURNS
LARGE = "{{ ('ab' * 1073741824) | length }}" + TURNS
"""A template that needs 2 GiB of memory."""


def refused(result: Result, message: str) -> None:
    assert (result.exit_code, result.stdout.strip(), result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith("moedisco: chat template: ")
    assert message in result.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(ENDLESS, "needs more than 3 s of computing time", marks=pytest.mark.slow),
        (LARGE, "needs more than 1 GiB of memory"),
        ("{{ raise_exception('the user is not polite') }}", "refuses these messages (the user is not polite)"),
        ("{{ 1 // 0 }}", "refuses these messages ("),
    ],
)
def test_chat_ends_in_one_line_where_a_template_takes_too_much(tmp_path: Path, template: str, message: str) -> None:
    """Protects a user who tries a stranger's model.

    Before (af276e38): nested loops were still rendered after 60 s; 2 GiB were taken; 1 // 0 was a traceback.
    """
    write_model(tmp_path, "qwen3_moe")
    (tmp_path / "chat_template.jinja").write_text(template)
    refused(CliRunner().invoke(app, ["chat", str(tmp_path), "--max-tokens", "2"], input="hello\n"), message)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_validate_ends_in_one_line_where_a_tokenizers_template_never_ends(tmp_path: Path) -> None:
    """Protects a run on conversations with a stranger's tokenizer.

    Before (af276e38): the first row was still rendered after 60 s.
    """
    write_tokenizer(tmp_path / "tokenizer", ENDLESS)
    path = write_rows(tmp_path / "chat.jsonl", "messages", [conversation(number) for number in range(3000)])
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "name": "a",
                "corpus": {"sources": [{"path": str(path), "messages_column": "messages", "on_error": "skip"}]},
                "model": {"family": "qwen3_moe"},
                "tokens": {"total": 10**6},
                "tokenizer": {"path": str(tmp_path / "tokenizer")},
                "output": str(tmp_path / "runs"),
            }
        )
    )
    refused(CliRunner().invoke(app, ["validate", str(config)]), "needs more than 3 s of computing time")


@pytest.mark.timeout(60)
def test_an_interrupted_conversation_leaves_no_answer_to_the_next(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "slow", _NUMBERS + "{% for _ in range(50) %}" + "{% endfor %}" * 2 + TURNS)
    write_tokenizer(tmp_path / "honest")
    slow, honest = GivenTokens(tmp_path / "slow"), GivenTokens(tmp_path / "honest")
    wanted = honest.render(talk_of(conversation(1)))
    timer = threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        slow.render(talk_of(conversation(0)))
    assert honest.render(talk_of(conversation(1))).text == wanted.text


@pytest.mark.timeout(60)
def test_other_templates_are_rendered_after_one_that_was_ended(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "endless", LARGE)
    write_tokenizer(tmp_path / "honest")
    with pytest.raises(ValueError, match="needs more than 1 GiB"):
        list(GivenTokens(tmp_path / "endless").conversation(conversation(0)))
    assert list(GivenTokens(tmp_path / "honest").conversation(conversation(0)))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGKILL, "9 (Killed)"), pytest.param(signal.SIGTERM, "15 (Terminated)", marks=pytest.mark.slow)],
)
def test_a_process_that_others_end_is_not_said_to_need_memory(tmp_path: Path, number: int, name: str) -> None:
    """Protects a user from replacing a template after the kernel ended its process on a machine without memory."""
    write_tokenizer(tmp_path / "endless", ENDLESS)
    write_tokenizer(tmp_path / "honest")
    assert GivenTokens(tmp_path / "honest").render(talk_of(conversation(0))).text  # the process has started
    children = psutil.Process(os.getpid()).children()
    [process] = [each for each in children if "template_process.py" in " ".join(each.cmdline())]
    timer = threading.Timer(0.2, process.send_signal, [number])
    timer.start()
    wanted = f"the chat template of .*endless was ended by signal {re.escape(name)}; try again"
    with pytest.raises(RunError, match=wanted):
        GivenTokens(tmp_path / "endless").render(talk_of(conversation(1)))
    assert GivenTokens(tmp_path / "honest").render(talk_of(conversation(0))).text
