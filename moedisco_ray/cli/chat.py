"""Chat with an exported model in a terminal. Import this module only to do so: it imports torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moedisco_ray.cli.expert_use import ExpertUse, use_lines
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.hf import no_progress_bar
from moedisco_ray.models.tokenizer_directories import load_pretrained

Message = dict[str, str]

_HELP = "An empty line does nothing, Ctrl-C stops an answer, /clear begins a new chat, /bye or Ctrl-D leaves."
_LEAVE, _CLEAR = "/bye", "/clear"


class Chat:
    """A conversation with a model, which prints its answers token by token.

    With a chat template, the model sees the conversation so far; the oldest messages are left out if it gets too long. A model
    without a template continues each line as the beginning of a document.

    Attributes:
        messages: The conversation so far; empty without a template.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        max_tokens: Maximum tokens per answer.
        temperature: Sampling temperature; 0 takes the likeliest token, None is what the model's `generation_config.json` says.
        shows_experts: Whether to print which experts compute the tokens of an answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, temperature: float | None,
        shows_experts: bool = False,
    ) -> None:
        self.messages: list[Message] = []
        self._model = model
        self._tokenizer = tokenizer
        self._most = int(model.config.max_position_embeddings)
        self._new = min(max_tokens, self._most - 1)
        self._sampling = _sampling(temperature)
        self._use = ExpertUse(model) if shows_experts else None

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return self._tokenizer.chat_template is not None

    def answer(self, line: str) -> str:
        """Print the model's answer as it is generated, and return it; Ctrl-C ends it early."""
        if self.has_template:
            self.messages.append({"role": "user", "content": line})
        ids = torch.tensor([self._prompt(line)], device=self._model.device)
        printer = _Printer(self._tokenizer)
        with contextlib.nullcontext() if self._use is None else self._use:
            try:
                self._model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._new, streamer=printer,
                    pad_token_id=self._tokenizer.eos_token_id, **self._sampling)
            except KeyboardInterrupt:
                printer.end()
        if self._use is not None:
            print(*use_lines(self._tokenizer, printer.ids, self._use.shares()[ids.shape[1]:]), sep="\n")
        if self.has_template:
            self.messages.append({"role": "assistant", "content": printer.text})
        return printer.text

    def _prompt(self, line: str) -> list[int]:
        most = self._most - self._new
        if not self.has_template:
            start = self._tokenizer(line)["input_ids"]
            before = [] if start[:1] == [self._tokenizer.bos_token_id] else [self._tokenizer.eos_token_id]
            return [*before, *start][-most:]
        while True:
            ids = _templated(self._tokenizer, self.messages)
            if len(ids) <= most or len(self.messages) == 1:
                return ids[-most:]
            del self.messages[:2]


def chat(directory: Path, *, device: str, max_tokens: int, temperature: float | None, shows_experts: bool) -> None:
    """Chat until the end of the input.

    Args:
        directory: An exported model with its tokenizer.
        device: Device that runs the model; `auto` is a GPU if one is visible.
        max_tokens: Maximum tokens per answer.
        temperature: Sampling temperature; see `Chat`.
        shows_experts: Whether to print the experts of each token; see `Chat`.

    Raises:
        ConfigError: The device does not exist here, or the directory holds no tokenizer.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("--device", device, "no GPU is visible here; use --device cpu")
    tokenizer = load_pretrained(directory, "RUN_DIR")
    with no_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype="auto", local_files_only=True, trust_remote_code=False).to(device).eval()
    conversation = Chat(model, tokenizer, max_tokens=max_tokens, temperature=temperature, shows_experts=shows_experts)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415  # `input` edits lines and remembers them once it is imported
        if not conversation.has_template:
            print("The model has no chat template: it continues each line, and does not see the lines before.")
        print(_HELP)
    converse(conversation, lambda: input("> " if is_terminal else ""))


def converse(conversation: Chat, read: Callable[[], str]) -> None:
    """Answer line after line.

    Args:
        conversation: The chat.
        read: Returns the next line; raises EOFError after the last one, and KeyboardInterrupt at Ctrl-C.
    """
    leaving = False
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            print("\n(Ctrl-C again or Ctrl-D leaves)")
            continue
        leaving = False
        if line == _LEAVE:
            return
        if line == _CLEAR:
            conversation.messages.clear()
        elif line:
            conversation.answer(line)


class _Printer(TextStreamer):
    """Prints whole words as they are generated, and keeps the text and its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then each token."""
        if not self.next_tokens_are_prompt:
            self.ids += value.flatten().tolist()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next piece."""
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def _sampling(temperature: float | None) -> dict[str, Any]:
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
