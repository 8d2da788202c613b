"""Conversations and tools as the rows of a source hold them, in the form that chat templates take.

Three formats are read: messages with `role` and `content` as OpenAI and Hugging Face write them, ShareGPT's with `from`
and `value`, and rows of Alpaca's. They mean what they mean in LLaMA-Factory and axolotl.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from moedisco_ray.stages.text.cutting import GivenTokensError, without_surrogates

Message = Mapping[str, Any]
Tools = list[Any] | None
TrainOn = Literal["all", "last"]
T = TypeVar("T")

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""Other names of roles, and their names in chat templates."""
_CALL = "function_call"
"""Role of ShareGPT's messages that call functions, and the field of OpenAI's earlier ones."""
_KNOWN_ROLES = ("system", "user", "assistant", "tool")
_THINKING = ("reasoning_content", "reasoning", "thinking")
"""Fields that hold the thinking before an answer; templates differ in the name."""
_READ = ("role", "content", "tool_calls", "tool_call_id", "name", "weight", "train")
"""Fields that are read here, or mean nothing for the text."""


class Talk(NamedTuple):
    """A conversation.

    Attributes:
        messages: The messages.
        trained: Whether the loss counts each message.
        unread: Fields of messages that neither this module nor the chat template reads.
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    unread: frozenset[str]


def talk_of(value: Any, template: str = "", train_on: TrainOn = "all", system: Any = None) -> Talk:
    """A conversation from a list of messages with `role` and `content`, or with `from` and `value`.

    Args:
        value: The messages. One of the assistant with `weight: 0` or `train: false` is not trained.
        template: The chat template, which may read further roles and fields.
        train_on: Whether to train all messages of the assistant, or the last one.
        system: System prompt of a conversation without a system message; None or an empty text without one.

    Raises:
        GivenTokensError: The value is no such list.
    """
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise GivenTokensError("a row holds no list of messages")
    found = _cleaned(value)
    messages = [_message(each, template) for each in found]
    trained = [
        message["role"] == "assistant" and _is_trained(each) for message, each in zip(messages, found, strict=True)
    ]
    if train_on == "last":
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        trained = [each and number == answers[-1] for number, each in enumerate(trained)]
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": without_surrogates(system)}, *messages]
        trained = [False, *trained]
    names = {name for message in messages for name in message}
    return Talk(
        messages, trained, frozenset(name for name in names if name not in _READ and not _reads(template, name))
    )


def alpaca(row: Mapping[str, Any], instruction: str) -> list[dict[str, Any]]:
    """The messages of a row of Alpaca's format, without its `system`.

    Args:
        row: A row with `output`, and perhaps `input`, which continues the instruction, and `history`: pairs of earlier
            instructions and outputs.
        instruction: Name of the column with the instruction.

    Raises:
        GivenTokensError: A value is not of the format.
    """
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise GivenTokensError("the history of a row is no list of pairs; write [[instruction, output], ...]")
    asked = [row.get(instruction), row.get("input")]
    if not all(each is None or isinstance(each, str) for each in asked):
        raise GivenTokensError("the instruction or the input of a row is no text")
    pairs = [*history, ["\n".join(each for each in asked if each), row.get("output")]]
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def tools_of(value: Any) -> Tools:
    """Tools from a list of JSON schemas, or from such a list as JSON text; None for an empty list.

    Raises:
        GivenTokensError: The value is no such list.
    """
    if isinstance(value, str) and not value.strip():
        return None
    try:
        found = _cleaned(json.loads(value), nulls=True) if isinstance(value, str) else _cleaned(value)
    except (ValueError, RecursionError) as error:
        raise GivenTokensError(f"the tools of a row are not JSON ({error})") from error
    if found is not None and not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
        raise GivenTokensError("the tools of a row are no list of JSON schemas")
    return [{"type": "function", "function": each} if "name" in each else each for each in found or []] or None


def _message(given: Mapping[str, Any], template: str) -> dict[str, Any]:
    message = dict(given)
    if "role" not in message and isinstance(message.get("from"), str):
        message = {"role": message.pop("from"), "content": message.pop("value", None), **message}
    role = message.get("role")
    if not isinstance(role, str):
        raise GivenTokensError("a message has no role; write messages with role and content")
    content = _text(message.get("content"))
    if role == _CALL:
        calls, role, content = _calls(content), "assistant", ""
    else:
        calls = _calls([*(message.pop("tool_calls", None) or []), *_as_list(message.pop(_CALL, None))])
    role = _ROLES.get(role, role)
    if role == "developer" and not _reads(template, role):
        role = "system"
    if role not in _KNOWN_ROLES and not _reads(template, role):
        raise GivenTokensError(
            f"a message has the role {role!r}, which the chat template does not name; write one of "
            f"{', '.join(_KNOWN_ROLES)}"
        )
    if content is None and not (calls and role == "assistant"):
        raise GivenTokensError("a message has no content; write text, or leave the message out")
    message |= {"role": role, "content": content or ""} | ({"tool_calls": calls} if calls else {})
    return _with_thinking(message, template)


def _text(content: Any) -> str | None:
    """Text of a message: a text, or the joined texts of its parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise GivenTokensError(f"the content of a message is a {type(content).__name__}; write text, or parts of text")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise GivenTokensError(f"a message has a part of the type {kind!r}; only parts of text can be trained on")
        texts.append(text)
    return "".join(texts)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _calls(value: Any) -> list[dict[str, Any]]:
    """Calls of functions with arguments as a dict, from a list of them, or from JSON text as ShareGPT has it."""
    if isinstance(value, str):
        value = _json(value)
    calls = []
    for each in _as_list(value):
        function = each.get("function", each) if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise GivenTokensError('a call of a function has no name; write {"name": ..., "arguments": {...}}')
        arguments = function.get("arguments", {})
        arguments = _json(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
        others = {key: other for key, other in each.items() if key not in ("function", "name", "arguments")}
        calls.append({"type": "function", **others, "function": {**function, "arguments": arguments}})
    return calls


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GivenTokensError(f"a call of a function is not JSON ({error})") from error


def _with_thinking(message: dict[str, Any], template: str) -> dict[str, Any]:
    """The message with its thinking under the name that the template reads."""
    given = next((name for name in _THINKING if isinstance(message.get(name), str)), None)
    read = next((name for name in _THINKING if _reads(template, name)), None)
    if given is None or read is None or read == given:
        return message
    return {read if name == given else name: value for name, value in message.items()}


def _is_trained(message: Mapping[str, Any]) -> bool:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise GivenTokensError(f"a message has the weight {weight!r}; write 0 or 1")
    return weight == 1 and message.get("train") is not False


def _reads(template: str, name: str) -> bool:
    """Whether a template names a role or a field of a message."""
    return re.search(rf"(\.|['\"]){re.escape(name)}\b", template) is not None


def _cleaned(value: Any, *, nulls: bool = False) -> Any:
    """The value without halves of surrogate pairs and keys that hold null.

    Args:
        value: A value of a row.
        nulls: Whether to keep keys that hold null: Parquet and Arrow give them to dicts that lack a key of another row.
    """
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, list):
        return [_cleaned(each, nulls=nulls) for each in value]
    if isinstance(value, dict):
        return {key: _cleaned(each, nulls=nulls) for key, each in value.items() if nulls or each is not None}
    return value


def first_that_works(messages: Sequence[Message], render: Callable[[list[dict[str, Any]]], T]) -> T:
    """The result of the first form of the messages that `render` takes; the error of the usual one if it takes none."""
    usual, *others = _forms(messages)
    try:
        return render(usual)
    except GivenTokensError:
        for form in others:
            with contextlib.suppress(GivenTokensError):
                return render(form)
        raise


def _forms(messages: Sequence[Message]) -> list[list[dict[str, Any]]]:
    """Forms of the same messages that templates take, the usual one first.

    Some templates take the arguments of a call as JSON text and no content next to calls, and some take content as a
    list of parts only.
    """
    usual = [dict(message) for message in messages]
    found = [usual]
    if any("tool_calls" in message for message in usual):
        found.append([_with_text_arguments(message) for message in usual])
        found.append([_without_content(message) for message in found[-1]])
    found.append([{**each, "content": [{"type": "text", "text": each["content"]}]} for each in usual])
    return found


def _with_text_arguments(message: Message) -> dict[str, Any]:
    if "tool_calls" not in message:
        return dict(message)
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _without_content(message: Message) -> dict[str, Any]:
    return {**message, "content": message["content"] or None} if "tool_calls" in message else dict(message)
