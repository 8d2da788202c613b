"""Find what the assistant writes in a conversation that a chat template has rendered.

If the template marks it with `{% generation %}`, its marks decide. Any other template is marked where it begins and
ends each message (`chat_marks`): an answer begins after the prompt for it, and ends with the token that ends a turn,
which some templates write at the start of the next message. The marks are used if the text with them is that without
them. In a template without a loop over messages, an answer begins where the template ends a prompt for it, and ends
where the template ends the conversation up to it.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from moedisco_ray.models.chat_marks import Span, is_marked, keep_thinking, rounds, with_marks
from moedisco_ray.models.chat_templates import Part, RenderedText, TemplateError, render, template_of
from moedisco_ray.stages.text.cutting import GivenTokensError
from moedisco_ray.stages.text.messages import Message, Tools, first_that_works

PLACE = "\N{OBJECT REPLACEMENT CHARACTER}0\N{OBJECT REPLACEMENT CHARACTER}"
"""Text in place of a turn's content, which no conversation contains."""
_THOUGHT, _OPEN = "</think>", "<think>"
_CALL = {"type": "function", "function": {"name": "call", "arguments": {}}}


class Turns(NamedTuple):
    """A rendered conversation.

    Attributes:
        text: The text.
        spans: What the assistant writes in each of its messages, by the number of the message. Under -1, what it writes
            in all messages, if a template marks it and does not say in which.
    """

    text: str
    spans: dict[int, list[Span]]


class TurnFinder:
    """Renders conversations with a tokenizer's chat template, and finds the assistant's turns in them.

    Args:
        tokenizer: The tokenizer, with a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = tuple(sorted((token.content for token in added), key=len, reverse=True))

    def template(self, tools: Tools = None) -> str:
        return template_of(self._tokenizer, tools) or ""

    def find(self, messages: Sequence[Message], tools: Tools = None) -> Turns:
        """Render a conversation and find the assistant's turns.

        Raises:
            GivenTokensError: The template cannot render the conversation or leaves a part of it out, or the turns
                cannot be found in it.
        """

        def rendered(form: list[dict[str, Any]]) -> Turns:
            found = self._found(form, tools)
            _check(messages, found)
            return found

        return first_that_works(messages, rendered)

    def apply(self, messages: Sequence[Message], tools: Tools, *, prompt: bool = False) -> str:
        """The rendered conversation, with the beginning of the next answer if it is a prompt."""
        return self._rendered(messages, [Part(len(messages), prompt)], tools)[0].text

    def encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Token ids of a text [n], and the first and last character (exclusive) of each token [n, 2]."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return np.array(found["input_ids"], np.int32), np.array(found["offset_mapping"], np.int64).reshape(-1, 2)

    def _found(self, messages: Sequence[Message], tools: Tools) -> Turns:
        own = self.template(tools)
        kept = keep_thinking(own)
        marked = with_marks(kept)
        if marked is not None:
            ((text, marks),) = self._rendered(messages, [Part(len(messages))], tools, marks=True, template=marked)
            places = rounds(marks, [message["role"] for message in messages])
            if places is not None and (kept != own or text == self.apply(messages, tools)):
                if is_marked(own):
                    return Turns(text, _attributed(messages, marks, places))
                return self._by_rounds(messages, text, places, marked)
        if is_marked(own):
            ((text, marks),) = self._rendered(messages, [Part(len(messages))], tools, marks=True)
            return Turns(text, {-1: list(marks)})
        return self._searched(messages, tools)

    def _by_rounds(self, messages: Sequence[Message], text: str, places: Sequence[Span | None], marked: str) -> Turns:
        """The turns in a text whose messages have these places."""
        opening, ends, stops = self._around(marked)
        spans: dict[int, list[Span]] = {}
        for number, (message, place) in enumerate(zip(messages, places, strict=True)):
            if message["role"] != "assistant" or place is None:
                continue
            start, stop = place
            said = text[start:stop]
            if opening and said.lstrip().startswith(opening):
                start += len(said) - len(said.lstrip()) + len(opening)
            if not said.rstrip().endswith(self._special):
                if ends:
                    raise GivenTokensError("the chat template ends a turn without the token that ends others")
                usual = stops["tool_calls" in message]
                if stop == len(text) and number == len(messages) - 1:
                    text += usual
                if usual:
                    stop += len(next((token for token in self._special if text.startswith(token, stop)), ""))
            spans[number] = [(start, stop)]
        _check_tools(messages, text, places)
        last, end = len(messages) - 1, places[-1]
        if last in spans and end is not None and self._are_special(text[end[1] :]):
            spans[last].append((end[1], len(text)))
        return Turns(text, spans)

    @functools.lru_cache(maxsize=8)  # noqa: B019  # a tokenizer has a template or two
    def _around(self, marked: str) -> tuple[str, bool, tuple[str, str]]:
        """What a marked template writes around answers.

        Returns:
            What comes before an answer, without the beginning of a thought, which some templates write for the model;
            whether an answer ends with a special token; and the special tokens that follow an answer and a call, if an
            answer does not.
        """
        user = {"role": "user", "content": "a"}
        answer = {"role": "assistant", "content": "a"}
        opening = ""
        for prompt in ([user], [{"role": "system", "content": "a"}, user]):
            try:
                ((text, marks),) = self._rendered(
                    prompt, [Part(len(prompt), prompt=True)], None, marks=True, template=marked
                )
            except GivenTokensError:
                continue
            opening = text[marks[-1][0] :] if marks else ""
            break
        call, tool = {**answer, "tool_calls": [_CALL]}, {**user, "role": "tool"}
        stop = self._stop([user, answer, user], marked)
        called = stop and (self._stop([user, call, tool], marked) or stop)
        return opening.partition(_OPEN)[0], stop == "", (stop or "", called or "")

    def _stop(self, messages: Sequence[Message], marked: str) -> str | None:
        """The special token at the start of the last message, if the answer before it ends without one.

        Returns:
            The token; an empty text if the answer ends with one; None if there is none.
        """
        try:
            ((text, marks),) = self._rendered(messages, [Part(len(messages))], None, marks=True, template=marked)
        except GivenTokensError:
            return None
        places = rounds(marks, [message["role"] for message in messages])
        if places is None or (place := places[-1]) is None:
            return None
        if text[: place[0]].rstrip().endswith(self._special):
            return ""
        return next((token for token in self._special if text.startswith(token, place[0])), None)

    def _are_special(self, text: str) -> bool:
        """Whether a text, which is not empty, consists of special tokens."""
        left = text.strip()
        while token := next((token for token in self._special if left.startswith(token)), ""):
            left = left[len(token) :].strip()
        return bool(text.strip()) and not left

    def _searched(self, messages: Sequence[Message], tools: Tools) -> Turns:
        """The turns by the texts of the conversation's beginnings."""
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        parts = [
            Part(len(messages)),
            *(Part(number, prompt=True) for number in turns),
            *(Part(number + 1) for number in turns),
        ]
        (text, _), *rest = self._rendered(messages, parts, tools)
        around = zip(turns, rest[: len(turns)], rest[len(turns) :], strict=True)
        spans = {
            number: [self._turn(messages, number, text, prompt=prompt, whole=whole, tools=tools)]
            for number, (prompt, _), (whole, _) in around
        }
        return Turns(text, spans)

    def _turn(self, messages: Sequence[Message], number: int, text: str, prompt: str, whole: str, tools: Tools) -> Span:
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

    def _turn_around(self, messages: Sequence[Message], number: int, prompt: str, text: str, tools: Tools) -> Span:
        """Find a turn by its content, for templates that render the last turn differently, such as with its reasoning.

        The content may occur elsewhere in the conversation, so it is replaced by a text that does not.
        """
        content = str(messages[number].get("content") or "").strip()
        marked = [*messages[:number], {**messages[number], "content": PLACE}, *messages[number + 1 :]]
        before, _, rest = self.apply(marked, tools).partition(PLACE)
        _, found, tail = self.apply(marked[: number + 1], tools).partition(PLACE)
        if not content or not found or text != before + content + rest:
            raise GivenTokensError(
                "the chat template renders a turn differently when the conversation continues, so the assistant's "
                "turns cannot be found; mark them in the template with {% generation %} and {% endgeneration %}"
            )
        ids, offsets = self.encode(tail)
        following, _ = self.encode(rest[: len(tail)])
        same = common(ids.tolist(), following.tolist())
        start = len(prompt) if text.startswith(prompt) else len(before)
        after = int(offsets[same - 1, 1]) if same else 0
        return start, len(before) + len(content) + after

    def _rendered(
        self,
        messages: Sequence[Message],
        parts: Sequence[Part],
        tools: Tools,
        *,
        marks: bool = False,
        template: str | None = None,
    ) -> list[RenderedText]:
        try:
            return render(self._tokenizer, messages, parts, tools, marks=marks, template=template)
        except TemplateError as error:
            raise GivenTokensError(f"the chat template cannot render a conversation ({error})") from error


def common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, one, other)))


def _attributed(
    messages: Sequence[Message], marks: Sequence[Span], places: Sequence[Span | None]
) -> dict[int, list[Span]]:
    """The template's own marks, by the number of the message that each is in; those after all belong to the last."""
    spans: dict[int, list[Span]] = {}
    for start, stop in marks:
        if start < stop:
            inside = (
                number for number, place in enumerate(places) if place is not None and place[0] <= start < place[1]
            )
            spans.setdefault(next(inside, len(messages) - 1), []).append((start, stop))
    return spans


def _check(messages: Sequence[Message], found: Turns) -> None:
    """Check that a text holds what the messages say.

    Raises:
        GivenTokensError: The template leaves something out, as some do with calls of functions and with text that is
            not in parts.
    """
    text, spans = found
    for number, message in enumerate(messages):
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        turn = "".join(text[slice(*span)] for span in spans.get(number, spans.get(-1, ())))
        if any(name not in turn for name in calls):
            raise GivenTokensError("the chat template leaves out a call of a function")
        said = str(message["content"])
        if message["role"] == "assistant":  # thinking may be left out, and some templates write none next to calls
            said = "" if calls else said.rpartition(_THOUGHT)[2]
        written = (said.strip(), json.dumps(said, ensure_ascii=False)[1:-1])  # some write what a tool returns as JSON
        if not any(each in text for each in written) and not all(line.strip() in text for line in said.splitlines()):
            raise GivenTokensError(
                f"the chat template leaves out the text of a message with the role {message['role']!r}"
            )


def _check_tools(messages: Sequence[Message], text: str, places: Sequence[Span | None]) -> None:
    """Check that what is no answer has a place of its own.

    Raises:
        GivenTokensError: The template leaves out what a tool returns, or writes it inside an answer.
    """
    for message, place in zip(messages, places, strict=True):
        if message["role"] == "tool" and message["content"] and place is not None and not text[slice(*place)].strip():
            raise GivenTokensError(
                "the chat template leaves out what a tool returns, or writes it inside a turn of the assistant; mark "
                "the turns in the template with {% generation %} and {% endgeneration %}"
            )
