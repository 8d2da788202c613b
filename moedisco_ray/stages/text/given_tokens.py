"""Turn conversations, completions and lists of token ids into documents, and mark the tokens that the loss counts.

The tokenizer's chat template renders a conversation, and the loss counts what the assistant writes (`turns`). Of a
completion, the loss counts all that follows the prompt.

This module imports transformers, which is slow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.config import RunConfig, Source, tokenizer_directory
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models.chat_templates import template_of
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.text.cutting import Document, GivenTokensError, without_surrogates
from moedisco_ray.stages.text.messages import Message, Talk, Tools, TrainOn, alpaca, first_that_works, talk_of, tools_of
from moedisco_ray.stages.text.pretrained import open_encoder
from moedisco_ray.stages.text.tally import Tally
from moedisco_ray.stages.text.turns import PLACE, TurnFinder, common

_IGNORED = -100
"""Label of a token that the loss does not count, as in transformers."""


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
        tokenizer = load_pretrained(directory)
        self._turns = TurnFinder(tokenizer)
        self._encoder = open_encoder(directory)
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def conversation(
        self,
        messages: Any,
        tools: Any = None,
        *,
        system: Any = None,
        train_on: TrainOn = "all",
        tally: Tally | None = None,
    ) -> Iterator[Document]:
        """Yield a rendered conversation as one document, unless the loss counts none of its tokens.

        Args:
            messages: The conversation.
            tools: Tools that the template gets: a list of JSON schemas, the same as JSON text, or None.
            system: System prompt of a conversation without a system message.
            train_on: Whether the loss counts all messages of the assistant, or the last one.
            tally: Gets the fields of messages that are not read.

        Raises:
            GivenTokensError: The template cannot render the conversation, or the assistant's turns cannot be found in
                it.
        """
        schemas = tools_of(tools)
        talk = talk_of(messages, self._turns.template(schemas), train_on, system)
        if tally is not None:
            tally.unread |= talk.unread
        if any(talk.trained):
            yield from self._whole(self.render(talk, schemas), tally)

    def instruction(
        self,
        row: Mapping[str, Any],
        column: str,
        tools: Any = None,
        *,
        train_on: TrainOn = "all",
        tally: Tally | None = None,
    ) -> Iterator[Document]:
        """Yield a row of Alpaca's format as `conversation` yields a conversation.

        Args:
            row: The row.
            column: Column with the instruction.
            tools: As in `conversation`.
            train_on: As in `conversation`.
            tally: As in `conversation`.

        Raises:
            GivenTokensError: As `conversation`, or the row is not of the format.
        """
        yield from self.conversation(
            alpaca(row, column), tools, system=row.get("system"), train_on=train_on, tally=tally
        )

    def completion(
        self, prompt: Any, completion: Any, tools: Any = None, *, tally: Tally | None = None
    ) -> Iterator[Document]:
        """Yield a prompt with its completion as `conversation` yields a conversation; the loss counts the completion.

        Args:
            prompt: Text, or a list of messages.
            completion: As the prompt. EOS follows a completion of text; in a conversation, the template ends turns.
            tools: As in `conversation`, for messages.
            tally: As in `conversation`.

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
            schemas = tools_of(tools)
            template = self._turns.template(schemas)
            asked_talk, answer = talk_of(prompt, template), talk_of(completion, template)
            if tally is not None:
                tally.unread |= asked_talk.unread | answer.unread
            text, start = self._answered(asked_talk.messages, answer.messages, schemas)
        ids, offsets = self._turns.encode(text)
        if isinstance(completion, str) and ids[-1:].tolist() != [self._encoder.eos]:
            ids, offsets = (
                np.append(ids, np.int32(self._encoder.eos)),
                np.append(offsets, [[len(text), len(text) + 1]], axis=0),
            )
        if start < len(text):
            yield from self._whole(Rendered(text, ids, offsets, offsets[:, 1] > start), tally)

    def _answered(self, prompt: Sequence[Message], completion: Sequence[Message], tools: Tools) -> tuple[str, int]:
        """A prompt with its completion, rendered, and the place of the completion's first character."""
        if not prompt:
            raise GivenTokensError("a prompt has no messages; write at least one")
        return first_that_works(
            [*prompt, *completion], lambda form: self._answered_in(form[: len(prompt)], form[len(prompt) :], tools)
        )

    def _answered_in(self, prompt: Sequence[Message], completion: Sequence[Message], tools: Tools) -> tuple[str, int]:
        asked, text = self._turns.apply(prompt, tools, prompt=True), self._turns.apply([*prompt, *completion], tools)
        if text.startswith(asked):
            return text, len(asked)
        # A template may end a prompt with more than it writes before an answer, such as an opening tag for reasoning.
        start = common(asked, text)
        if start < common(asked, self._turns.apply(prompt, tools)):
            raise GivenTokensError(
                "the chat template renders a prompt differently before its completion, which cannot be found"
            )
        return text, start

    def _whole(self, rendered: Rendered, tally: Tally | None) -> Iterator[Document]:
        """Yield a rendered text as one document, unless the loss counts none of its tokens."""
        text, ids, _, loss_mask = rendered
        if tally is not None:
            tally.masked += 1
            tally.ended += not self._special.isdisjoint(ids[loss_mask].tolist())
        first = int(len(ids) > 0 and ids[0] == self._encoder.bos)  # packing adds it
        if text and loss_mask[first:].any():
            yield Document(text, begins=True, tokens=ids[first:], loss_mask=loss_mask[first:])

    def tokens(self, ids: Any, limit: int, labels: Any = None) -> Iterator[Document]:
        """Yield token ids as one document, or without labels as parts of one group if they are more than `limit`.

        Args:
            ids: The token ids.
            limit: Maximum tokens of a document.
            labels: For each token its id, or -100 if the loss does not count it; None: it counts all.

        Raises:
            GivenTokensError: The value is not a list of ids of the tokenizer, or the labels are not those of the ids.
        """
        vocab_size = self._encoder.vocab_size
        if not (isinstance(ids, list) and all(isinstance(each, int) and 0 <= each < vocab_size for each in ids)):
            raise GivenTokensError(f"a row holds no list of ids below {vocab_size}, the size of the vocabulary")
        found = np.array(ids, dtype=np.int32)
        mask = None if labels is None else _counted(ids, labels)
        first = int(len(found) > 0 and found[0] == self._encoder.bos)
        last = len(found)
        if mask is None and last > first and found[-1] == self._encoder.eos:  # packing adds it, and counts it
            last -= 1
        each = limit if mask is None else max(1, last)  # packing keeps a document with a mask whole
        parts = [slice(start, min(start + each, last)) for start in range(first, last, each)]
        begins = True
        for part, text in zip(parts, self._encoder.decode([found[part] for part in parts]), strict=True):
            counted = None if mask is None else mask[part]
            if counted is None or counted.any():
                yield Document(text, begins, tokens=found[part], loss_mask=counted)
                begins = False

    def render(self, talk: Talk, tools: Tools = None) -> Rendered:
        """Render a conversation and find the tokens that the loss counts.

        Raises:
            GivenTokensError: The template cannot render the conversation, or the assistant's turns cannot be found in
                it.
        """
        text, spans = self._turns.find(talk.messages, tools)
        answers = [trained for trained, message in zip(talk.trained, talk.messages, strict=True) if _answers(message)]
        if -1 in spans and not all(answers):
            raise GivenTokensError(
                "the chat template does not say which turn each of its marks is in, so that single turns cannot be "
                "left out of training"
            )
        ids, offsets = self._turns.encode(text)
        loss_mask = np.zeros(len(ids), dtype=np.bool_)
        for number, found in spans.items():
            for start, stop in found if number < 0 or talk.trained[number] else ():
                loss_mask |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        return Rendered(text, ids, offsets, loss_mask)

    def turn_end(self) -> int | None:
        """The special token that the chat template writes after an answer; None without one or without a template."""
        try:
            text, ids, offsets, loss_mask = self.render(
                talk_of([{"role": role, "content": PLACE} for role in ("user", "assistant")])
            )
        except GivenTokensError:
            return None
        after = ids[loss_mask & (offsets[:, 0] >= text.rfind(PLACE) + len(PLACE))]
        return next((token for token in after.tolist() if token in self._special), None)


def _counted(ids: Sequence[int], labels: Any) -> NDArray[np.bool_]:
    """Whether the loss counts each token [n], by the labels of a row."""
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise GivenTokensError("the labels of a row are not as many as its ids")
    if any(label not in (each, _IGNORED) for label, each in zip(labels, ids, strict=True)):
        raise GivenTokensError(
            f"a label is neither the id of its token nor {_IGNORED}; write labels that are not shifted"
        )
    return np.array(labels) != _IGNORED


def _answers(message: Message) -> bool:
    return bool(message["role"] == "assistant")


@functools.lru_cache(maxsize=1)
def given_tokens(directory: Path) -> GivenTokens:
    """The maker of documents for the tokenizer in a directory; the last one is kept."""
    return GivenTokens(directory)


def documents_of(
    made: GivenTokens, source: Source, row: Mapping[str, Any], limit: int, tally: Tally
) -> Iterator[Document]:
    """Documents of a row of a source.

    Args:
        made: Makes them.
        source: The source, which names the columns.
        row: The row.
        limit: Maximum tokens of a document.
        tally: Counts rows.

    Raises:
        GivenTokensError: The row cannot be read.
    """
    first = row[next(iter(source.columns.values()))]
    tools = None if source.tools_column is None else row[source.tools_column]
    if first is None:
        return
    if source.completion_column is not None:
        yield from made.completion(row[source.prompt_column], first, tools, tally=tally)
    elif source.ids_column is not None:
        yield from made.tokens(first, limit, row.get("labels"))
    elif source.instruction_column is not None:
        yield from made.instruction(row, source.instruction_column, tools, train_on=source.train_on, tally=tally)
    else:
        yield from made.conversation(first, tools, system=row.get("system"), train_on=source.train_on, tally=tally)


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
        if not any(source.messages_column or source.instruction_column for source in sources):
            return  # token ids and completions of text need none
        raise ConfigError(
            "tokenizer.path",
            str(directory),
            "has no chat template, which sources with messages_column or instruction_column need; name the tokenizer "
            "of a chat model, or add chat_template.jinja to the directory",
        )
