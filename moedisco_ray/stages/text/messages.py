"""Conversations and tools as the rows of a source hold them, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moedisco_ray.stages.text.cutting import GivenTokensError, without_surrogates

Message = Mapping[str, Any]
Tools = list[Any] | None

_ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of messages with the keys `from` and `value`, and their names in chat templates."""


def messages_of(value: Any) -> list[dict[str, Any]]:
    """A conversation with the keys `role` and `content`, from one with these keys or with `from` and `value`.

    Raises:
        GivenTokensError: The value is no list of messages with roles.
    """
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise GivenTokensError("a row holds no list of messages")
    messages = []
    for each in _cleaned(value):
        message = each
        if "role" not in message and isinstance(message.get("from"), str):
            message = {"role": _ROLES.get(message["from"], message["from"]), "content": message.get("value", "")}
        if not isinstance(message.get("role"), str):
            raise GivenTokensError("a message has no role; write messages with role and content")
        messages.append(message)
    return messages


def tools_of(value: Any) -> Tools:
    """Tools from a list of JSON schemas, or from such a list as JSON text; None for an empty list.

    Raises:
        GivenTokensError: The value is no such list.
    """
    try:
        found = _cleaned(json.loads(value), nulls=True) if isinstance(value, str) else _cleaned(value)
    except (ValueError, RecursionError) as error:
        raise GivenTokensError(f"the tools of a row are not JSON ({error})") from error
    if found is not None and not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
        raise GivenTokensError("the tools of a row are no list of JSON schemas")
    return found or None


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
