"""Chat with an exported model in a terminal. Import this module only to do so: it imports torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from moedisco_ray.cli.expert_use import ExpertUse, use_lines
from moedisco_ray.cli.generation import Message, document_ids, sampling, templated_ids

_HELP = "An empty line does nothing, Ctrl-C stops an answer, /clear begins a new chat, /bye or Ctrl-D leaves."
_LEAVE, _CLEAR = "/bye", "/clear"


class Chat:
    """A conversation with a model, which prints its answers token by token.

    With a chat template, the model sees the conversation so far; the oldest messages are left out if it gets too long.
    A model without a template continues each line as the beginning of a document.

    Attributes:
        messages: The conversation so far; empty without a template.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        max_tokens: Maximum tokens per answer; in a long conversation, at most half of the model's positions.
        temperature: Sampling temperature; 0 takes the likeliest token, None is what the model's
            `generation_config.json` says.
        shows_experts: Whether to print which experts compute the tokens of an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_tokens: int,
        temperature: float | None,
        shows_experts: bool = False,
    ) -> None:
        self.messages: list[Message] = []
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._positions = int(model.config.max_position_embeddings)
        self._sampling = sampling(temperature)
        self._use = ExpertUse(model) if shows_experts else None

    @property
    def has_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def answer(self, line: str) -> str:
        """Print the model's answer as it is generated, and return it; Ctrl-C ends it early."""
        if self.has_template:
            self.messages.append({"role": "user", "content": line})
        ids = torch.tensor([self._prompt(line)], device=self._model.device)
        new = min(self._max_tokens, self._positions - ids.shape[1])
        printer = _Printer(self._tokenizer)
        with contextlib.nullcontext() if self._use is None else self._use:
            try:
                self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    streamer=printer,
                    pad_token_id=self._tokenizer.eos_token_id,
                    **self._sampling,
                )
            except KeyboardInterrupt:
                printer.end()
        if self._use is not None:
            print(*use_lines(self._tokenizer, printer.ids, self._use.shares()[ids.shape[1] :]), sep="\n")
        if self.has_template:
            self.messages.append({"role": "assistant", "content": printer.text})
        return printer.text

    def _prompt(self, line: str) -> list[int]:
        most = self._positions - min(self._max_tokens, self._positions // 2)
        if not self.has_template:
            return document_ids(self._tokenizer, line)[-most:]
        while True:
            ids = templated_ids(self._tokenizer, self.messages)
            if len(ids) <= most or len(self.messages) == 1:
                return ids[-most:]
            del self.messages[:2]


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    temperature: float | None,
    shows_experts: bool,
) -> None:
    """Chat until the end of the input; see `Chat` for the arguments."""
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
