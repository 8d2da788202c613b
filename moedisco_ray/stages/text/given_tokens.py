"""Turn conversations and lists of token ids into documents whose tokens are given, with the tokens that the loss counts.

The tokenizer's chat template renders a conversation, and the loss counts what the assistant writes. If the template marks it with
`{% generation %}`, the marks decide, as in transformers. In any other template, an assistant's turn begins where the template ends
a prompt for it, and ends where the template ends the conversation up to this turn.

This module imports transformers, which is slow.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moedisco_ray.core.config import RunConfig, tokenizer_directory
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.text.cutting import Document, GivenTokensError
from moedisco_ray.stages.text.pretrained import open_encoder

Message = Mapping[str, Any]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of messages with the keys `from` and `value`, and their names in chat templates."""


class Rendered(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The rendered text.
        ids: Token ids of the text [n].
        offsets: First and last character (exclusive) of each token [n, 2].
        loss_mask: Whether the loss counts each token [n].
    """

    text: str
    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


class GivenTokens:
    """Makes documents with given tokens.

    Args:
        directory: Directory of the tokenizer.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = load_pretrained(directory)
        self._encoder = open_encoder(directory)
        self._is_marked = _MARKED.search(_template(self._tokenizer) or "") is not None

    def conversation(self, messages: Any, limit: int) -> Iterator[Document]:
        """Render a conversation and yield it as one document, or as the parts of one group if it is longer than `limit` tokens.

        Parts without a token that the loss counts are left out.

        Raises:
            GivenTokensError: The template cannot render the conversation, or the assistant's turns cannot be found in it.
        """
        text, ids, offsets, loss_mask = self.render(_messages(messages))
        first = int(len(ids) > 0 and ids[0] == self._encoder.bos)   # packing adds it
        begins = True
        for start in range(first, len(ids), limit):
            stop = min(start + limit, len(ids))
            if loss_mask[start:stop].any():
                part = text[0 if start == first else offsets[start, 0]:len(text) if stop == len(ids) else offsets[stop, 0]]
                yield Document(part, begins, tokens=ids[start:stop], loss_mask=loss_mask[start:stop])
                begins = False

    def tokens(self, ids: Any, limit: int) -> Iterator[Document]:
        """Yield token ids as one document, or as the parts of one group if they are more than `limit`.

        Raises:
            GivenTokensError: The value is not a list of ids of the tokenizer.
        """
        if not isinstance(ids, list) or not all(isinstance(each, int) and 0 <= each < self._encoder.vocab_size for each in ids):
            raise GivenTokensError(f"a row holds no list of ids below {self._encoder.vocab_size}, the size of the vocabulary")
        found = np.array(ids, dtype=np.int32)
        if len(found) and found[0] == self._encoder.bos:
            found = found[1:]
        if len(found) and found[-1] == self._encoder.eos:     # packing adds it
            found = found[:-1]
        parts = [found[start:start + limit] for start in range(0, len(found), limit)]
        for number, (part, text) in enumerate(zip(parts, self._encoder.decode(parts), strict=True)):
            yield Document(text, begins=number == 0, tokens=part)

    def render(self, messages: Sequence[Message]) -> Rendered:
        """Render a conversation and find the tokens that the loss counts.

        Raises:
            GivenTokensError: The template cannot render the conversation, or the assistant's turns cannot be found in it.
        """
        text = self._apply(messages)
        if self._is_marked:
            found = self._tokenizer.apply_chat_template(
                list(messages), return_dict=True, return_assistant_tokens_mask=True,
                tokenizer_kwargs={"return_offsets_mapping": True})
            return Rendered(
                text, np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int64).reshape(-1, 2),
                np.array(found["assistant_masks"], np.bool_))
        ids, offsets = self._encode(text)
        loss_mask = np.zeros(len(ids), dtype=np.bool_)
        for start, stop in self._turns(messages, text):
            loss_mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        return Rendered(text, ids, offsets, loss_mask)

    def _turns(self, messages: Sequence[Message], text: str) -> Iterator[tuple[int, int]]:
        """First and last character (exclusive) of each turn of the assistant in a rendered conversation."""
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._apply(messages[:number], prompt=True)
                whole = self._apply(messages[:number + 1])
                if text.startswith(whole) and whole.startswith(prompt):
                    yield len(prompt), len(whole)
                else:
                    yield self._turn_around(str(message.get("content") or "").strip(), prompt, whole, text)

    def _turn_around(self, content: str, prompt: str, whole: str, text: str) -> tuple[int, int]:
        """Find a turn by its content, for templates that render the last turn differently, for example with its reasoning."""
        shared = _common(prompt, text)
        place = text.find(content, shared) if content else -1
        if place < 0 or not content or (end := whole.rfind(content)) < 0:
            raise GivenTokensError(
                "the chat template renders a turn differently when the conversation continues, so the assistant's turns cannot be "
                "found; mark them in the template with {% generation %} and {% endgeneration %}")
        tail = whole[end + len(content):]
        rest = text[place + len(content):]
        ids, offsets = self._encode(tail)
        following, _ = self._encode(rest[:len(tail)])
        same = _common(ids.tolist(), following.tolist())
        return shared if shared == len(prompt) else place, place + len(content) + (int(offsets[same - 1, 1]) if same else 0)

    def _encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int64).reshape(-1, 2)

    def _apply(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        try:
            rendered: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise GivenTokensError(f"the chat template cannot render a conversation ({error})") from error
        return rendered


@functools.lru_cache(maxsize=1)
def given_tokens(directory: Path) -> GivenTokens:
    """The maker of documents for the tokenizer in a directory; the last one is kept."""
    return GivenTokens(directory)


def check_sources(config: RunConfig) -> None:
    """Check that the run's tokenizer can read the sources with conversations and token ids, if there are any.

    Raises:
        ConfigError: The run trains its own tokenizer, or the tokenizer has no chat template, or its chat template writes the token
            between documents inside conversations, and tokens are to attend within documents.
    """
    sources = [source for source in (*config.corpus.sources, *config.evaluation.sources) if source.list_column is not None]
    if not sources:
        return
    directory = tokenizer_directory(config)
    if directory is None:
        raise ConfigError(
            "tokenizer.path", None, f"is not set, but {sources[0].path!r} holds conversations or token ids; name the directory of "
            "their tokenizer")
    if not any(source.messages_column for source in sources):
        return
    tokenizer = load_pretrained(directory)
    if _template(tokenizer) is None:
        raise ConfigError(
            "tokenizer.path", str(directory), "has no chat template, which sources with messages_column need; name the tokenizer "
            "of a chat model, or add chat_template.jinja to the directory")
    for name, optimizer in (("submodels", config.submodels.optimizer), ("finetune", config.finetune.optimizer)):
        if optimizer.within_documents and _separates_turns(directory):
            raise ConfigError(
                f"{name}.optimizer.within_documents", "true", "the chat template ends each turn with the token that separates "
                "documents, so tokens would attend to their own turn only; set it to false")


def _separates_turns(directory: Path) -> bool:
    """Whether the token that training puts before each document occurs inside conversations."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    found = next(GivenTokens(directory).conversation(turns, 1 << 20), None)
    return found is not None and found.tokens is not None and open_encoder(directory).prefix in found.tokens


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    try:
        found: str = tokenizer.get_chat_template()
    except ValueError:      # it has none
        return None
    return found


def _messages(value: Any) -> list[dict[str, Any]]:
    """A conversation with the keys `role` and `content`, from one with these keys or with `from` and `value`."""
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise GivenTokensError("a row holds no list of messages")
    messages = []
    for each in value:
        message = {key: part for key, part in each.items() if part is not None}
        if "role" not in message and "from" in message:
            message = {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value", "")}
        if not isinstance(message.get("role"), str):
            raise GivenTokensError("a message has no role; write messages with role and content")
        messages.append(message)
    return messages


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, one, other)))
