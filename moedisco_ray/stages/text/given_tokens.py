"""Turn conversations, completions and lists of token ids into documents, and mark the tokens that the loss counts.

The tokenizer's chat template renders a conversation, and the loss counts what the assistant writes. If the template
marks it with `{% generation %}`, the marks decide, as in transformers. In any other template, an assistant's turn
begins where the template ends a prompt for it, and ends where the template ends the conversation up to this turn. Of a
completion, the loss counts all that follows the prompt.

This module imports transformers, which is slow.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.config import RunConfig, tokenizer_directory
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.chat_templates import Part, RenderedText, TemplateError, render, template_of
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.text.cutting import Document, GivenTokensError, without_surrogates
from moedisco_ray.stages.text.messages import Message, Tools, messages_of, tools_of
from moedisco_ray.stages.text.pretrained import open_encoder

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}0\N{OBJECT REPLACEMENT CHARACTER}"
"""Text in place of a turn's content, which no conversation contains."""


class Rendered(NamedTuple):
    """A rendered conversation, or a prompt with its completion.

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

    def conversation(self, messages: Any, tools: Any = None) -> Iterator[Document]:
        """Yield a rendered conversation as one document, unless the loss counts none of its tokens.

        Args:
            messages: The conversation.
            tools: Tools that the template gets: a list of JSON schemas, the same as JSON text, or None.

        Raises:
            GivenTokensError: The template cannot render the conversation, or the assistant's turns cannot be found in
                it.
        """
        if found := messages_of(messages):
            yield from self._whole(self.render(found, tools_of(tools)))

    def completion(self, prompt: Any, completion: Any, tools: Any = None) -> Iterator[Document]:
        """Yield a prompt with its completion as `conversation` yields a conversation; the loss counts the completion.

        Args:
            prompt: Text, or a list of messages.
            completion: As the prompt. EOS follows a completion of text; in a conversation, the template ends turns.
            tools: As in `conversation`, for messages.

        Raises:
            GivenTokensError: One is text and the other is not, or the template renders the prompt differently before a
                completion.
        """
        if isinstance(prompt, str) and isinstance(completion, str):
            asked = without_surrogates(prompt)
            text, start = asked + without_surrogates(completion), len(asked)
        elif isinstance(prompt, str) or isinstance(completion, str):
            raise GivenTokensError("a row holds text and messages; write prompt and completion alike")
        else:
            text, start = self._answered(messages_of(prompt), messages_of(completion), tools_of(tools))
        ids, offsets = self._encode(text)
        if isinstance(completion, str) and ids[-1:].tolist() != [self._encoder.eos]:
            ids, offsets = (
                np.append(ids, np.int32(self._encoder.eos)),
                np.append(offsets, [[len(text), len(text) + 1]], axis=0),
            )
        if start < len(text):
            yield from self._whole(Rendered(text, ids, offsets, offsets[:, 1] > start))

    def _answered(self, prompt: Sequence[Message], completion: Sequence[Message], tools: Tools) -> tuple[str, int]:
        """A prompt with its completion, rendered, and the place of the completion's first character."""
        if not prompt:
            raise GivenTokensError("a prompt has no messages; write at least one")
        asked, text = self._apply(prompt, tools, prompt=True), self._apply([*prompt, *completion], tools)
        if text.startswith(asked):
            return text, len(asked)
        # A template may end a prompt with more than it writes before an answer, such as an opening tag for reasoning.
        start = _common(asked, text)
        if start < _common(asked, self._apply(prompt, tools)):
            raise GivenTokensError(
                "the chat template renders a prompt differently before its completion, which cannot be found"
            )
        return text, start

    def _whole(self, rendered: Rendered) -> Iterator[Document]:
        """Yield a rendered text as one document, unless the loss counts none of its tokens."""
        first = int(len(rendered.ids) > 0 and rendered.ids[0] == self._encoder.bos)  # packing adds it
        if rendered.text and rendered.loss_mask[first:].any():
            yield Document(
                rendered.text, begins=True, tokens=rendered.ids[first:], loss_mask=rendered.loss_mask[first:]
            )

    def tokens(self, ids: Any, limit: int) -> Iterator[Document]:
        """Yield token ids as one document, or as the parts of one group if they are more than `limit`.

        Raises:
            GivenTokensError: The value is not a list of ids of the tokenizer.
        """
        vocab_size = self._encoder.vocab_size
        if not (isinstance(ids, list) and all(isinstance(each, int) and 0 <= each < vocab_size for each in ids)):
            raise GivenTokensError(f"a row holds no list of ids below {vocab_size}, the size of the vocabulary")
        found = np.array(ids, dtype=np.int32)
        if len(found) and found[0] == self._encoder.bos:
            found = found[1:]
        if len(found) and found[-1] == self._encoder.eos:  # packing adds it
            found = found[:-1]
        parts = [found[start : start + limit] for start in range(0, len(found), limit)]
        for number, (part, text) in enumerate(zip(parts, self._encoder.decode(parts), strict=True)):
            yield Document(text, begins=number == 0, tokens=part)

    def render(self, messages: Sequence[Message], tools: Tools = None) -> Rendered:
        """Render a conversation and find the tokens that the loss counts.

        Raises:
            GivenTokensError: The template cannot render the conversation, or the assistant's turns cannot be found in
                it.
        """
        has_marks = _MARKED.search(template_of(self._tokenizer, tools) or "") is not None
        turns = (
            [] if has_marks else [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        )
        parts = [
            Part(len(messages)),
            *(Part(number, prompt=True) for number in turns),
            *(Part(number + 1) for number in turns),
        ]
        (text, spans), *rest = self._rendered(messages, parts, tools, marks=has_marks)
        ids, offsets = self._encode(text)
        loss_mask = np.zeros(len(ids), dtype=np.bool_)
        around = zip(turns, rest[: len(turns)], rest[len(turns) :], strict=True)
        found = (
            self._turn(messages, number, text, prompt=prompt, whole=whole, tools=tools)
            for number, (prompt, _), (whole, _) in around
        )
        for start, stop in spans if has_marks else found:
            loss_mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        return Rendered(text, ids, offsets, loss_mask)

    def turn_end(self) -> int | None:
        """The special token that the chat template writes after an answer; None without one or without a template."""
        try:
            text, ids, offsets, loss_mask = self.render(
                [{"role": role, "content": _PLACE} for role in ("user", "assistant")]
            )
        except GivenTokensError:
            return None
        added = self._tokenizer.added_tokens_decoder
        after = ids[loss_mask & (offsets[:, 0] >= text.rfind(_PLACE) + len(_PLACE))].tolist()
        return next((token for token in after if token in added and added[token].special), None)

    def _turn(
        self, messages: Sequence[Message], number: int, text: str, prompt: str, whole: str, tools: Tools
    ) -> tuple[int, int]:
        """First and last character (exclusive) of a turn of the assistant in a rendered conversation.

        Args:
            messages: The conversation.
            number: Index of the turn's message.
            text: The rendered conversation.
            prompt: The conversation before the turn, with the beginning of an answer.
            whole: The conversation up to the turn and with it.
            tools: Tools that the template gets.
        """
        if text.startswith(whole) and whole.startswith(prompt):
            return len(prompt), len(whole)
        return self._turn_around(messages, number, prompt, text, tools)

    def _turn_around(
        self, messages: Sequence[Message], number: int, prompt: str, text: str, tools: Tools
    ) -> tuple[int, int]:
        """Find a turn by its content, for templates that render the last turn differently, such as with its reasoning.

        The content may occur elsewhere in the conversation, so it is replaced by a text that does not.
        """
        content = str(messages[number].get("content") or "").strip()
        marked = [*messages[:number], {**messages[number], "content": _PLACE}, *messages[number + 1 :]]
        before, _, rest = self._apply(marked, tools).partition(_PLACE)
        _, found, tail = self._apply(marked[: number + 1], tools).partition(_PLACE)
        if not content or not found or text != before + content + rest:
            raise GivenTokensError(
                "the chat template renders a turn differently when the conversation continues, so the assistant's "
                "turns cannot be found; mark them in the template with {% generation %} and {% endgeneration %}"
            )
        ids, offsets = self._encode(tail)
        following, _ = self._encode(rest[: len(tail)])
        same = _common(ids.tolist(), following.tolist())
        start = len(prompt) if text.startswith(prompt) else len(before)
        after = int(offsets[same - 1, 1]) if same else 0
        return start, len(before) + len(content) + after

    def _encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int64).reshape(-1, 2)

    def _apply(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> str:
        return self._rendered(messages, [Part(len(messages), prompt)], tools)[0].text

    def _rendered(
        self, messages: Sequence[Message], parts: Sequence[Part], tools: Tools, *, marks: bool = False
    ) -> list[RenderedText]:
        try:
            return render(self._tokenizer, messages, parts, tools, marks=marks)
        except TemplateError as error:
            raise GivenTokensError(f"the chat template cannot render a conversation ({error})") from error


@functools.lru_cache(maxsize=1)
def given_tokens(directory: Path) -> GivenTokens:
    """The maker of documents for the tokenizer in a directory; the last one is kept."""
    return GivenTokens(directory)


def check_sources(config: RunConfig) -> None:
    """Check that the run's tokenizer can read the sources that need it (`Source.has_given_tokens`), if there are any.

    Raises:
        ConfigError: The run trains its own tokenizer, or the tokenizer has no chat template.
    """
    sources = [source for source in (*config.corpus.sources, *config.evaluation.sources) if source.has_given_tokens]
    if not sources:
        return
    directory = tokenizer_directory(config)
    if directory is None:
        raise ConfigError(
            "tokenizer.path",
            None,
            f"is not set, but {sources[0].path!r} holds conversations, completions or token ids; name the "
            "directory of their tokenizer",
        )
    if template_of(load_pretrained(directory)) is None:
        if not any(source.messages_column for source in sources):
            return  # token ids and completions of text need none
        raise ConfigError(
            "tokenizer.path",
            str(directory),
            "has no chat template, which sources with messages_column need; name the tokenizer "
            "of a chat model, or add chat_template.jinja to the directory",
        )


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, one, other)))
