"""Render chat templates of tokenizers in a process that ends when a template takes too much time or memory."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from moedisco_ray.core.errors import ConfigError, RunError
from moedisco_ray.models.template_process import MEMORY_BYTES, OUT_OF_MEMORY, SECONDS

_EXCEEDED = {-signal.SIGPROF: f"{SECONDS} s of computing time", OUT_OF_MEMORY: f"{MEMORY_BYTES >> 30} GiB of memory"}
"""What a template has used up, by the exit code of its process."""
_PROGRAM = Path(__file__).with_name("template_process.py")


class TemplateError(ValueError):
    """The template refuses a conversation, or fails on it."""


class RenderedText(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The text.
        spans: First and last character (exclusive) of what `{% generation %}` blocks of the template wrote, if they
            were asked for.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None) -> str | None:
    try:
        found: str = tokenizer.get_chat_template(tools=tools)
    except ValueError:  # it has none
        return None
    return found


class Part(NamedTuple):
    """The beginning of a conversation.

    Attributes:
        messages: Number of messages.
        prompt: Whether to add the beginning of the next answer.
    """

    messages: int
    prompt: bool = False


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    parts: Sequence[Part],
    tools: Sequence[Any] | None = None,
    *,
    marks: bool = False,
    template: str | None = None,
) -> list[RenderedText]:
    """Render parts of a conversation as `apply_chat_template` does, in a process with limits.

    Args:
        tokenizer: The tokenizer, with a chat template.
        messages: The conversation.
        parts: The parts to render. All in one call cost one change of processes.
        tools: JSON schemas of tools.
        marks: Whether to return the spans of `{% generation %}` blocks.
        template: The template to render with; None for the tokenizer's own.

    Raises:
        TemplateError: The template refuses the conversation, or fails on it.
        ConfigError: The template takes too much time or memory.
        RunError: The process that renders was ended by something else.
    """
    if not all(part.messages for part in parts):
        raise TemplateError("there is no message")
    asked = {
        "template": template_of(tokenizer, tools) if template is None else template,
        "special_tokens": tokenizer.special_tokens_map,
        "messages": list(messages),
        "tools": tools,
        "parts": parts,
        "marks": marks,
    }
    process = _process(os.getpid())
    try:
        answer = process.ask(json.dumps(asked, default=str).encode())
    except BaseException:  # such as Ctrl-C: the next conversation would get this one's answer
        _process.cache_clear()
        raise
    if answer is None:
        _process.cache_clear()
        raise _ended(process.exit_code, tokenizer.name_or_path)
    if "failed" in answer:
        raise TemplateError(answer["failed"])
    return [RenderedText(text, tuple(map(tuple, spans))) for text, spans in answer["parts"]]


class _Process:
    """The process that renders; it ends when its connection is closed, also if this process is killed."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            # `-P`, because modules next to the program have names of installed packages. A session of its own, because
            # Ctrl-C in a terminal ends an answer, not this process.
            self._popen = subprocess.Popen(  # noqa: S603  # our own program
                [sys.executable, "-P", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection, self._lock = ours, threading.Lock()
        weakref.finalize(self, _end, self._popen, ours)
        if self._received() is None:
            raise RunError(
                f"the process that renders chat templates does not start; see what `{sys.executable} {_PROGRAM} 0` says"
            )

    @property
    def exit_code(self) -> int:
        """Exit status of the process, which has ended; the signal that ended it as a negative number."""
        return self._popen.wait()

    def ask(self, asked: bytes) -> Any:
        """The answer to a request; None if the process has ended."""
        with self._lock:
            try:
                self._connection.send_bytes(asked)
            except OSError:
                return None
            answer = self._received()
        return None if answer is None else json.loads(answer)

    def _received(self) -> bytes | None:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            return None


@functools.lru_cache(maxsize=1)
def _process(owner: int) -> _Process:
    """The process of this process, whose id is `owner`: a fork must not share the connection."""
    del owner
    return _Process()


def _ended(exit_code: int, tokenizer: str) -> ConfigError | RunError:
    if used := _EXCEEDED.get(exit_code):
        return ConfigError(
            "chat template",
            tokenizer,
            f"needs more than {used} for a conversation; replace the template in "
            "chat_template.jinja or tokenizer_config.json",
        )
    ended = f"ended with status {exit_code}"
    if exit_code < 0:
        ended = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return RunError(
        f"the process that renders the chat template of {tokenizer} {ended}; try again, and end other programs if this "
        "machine runs out of memory"
    )


def _end(popen: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    popen.kill()
    popen.wait()
