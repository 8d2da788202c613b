"""Readers of answers. Fields that a newer service adds are passed over."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from service.client.calls import Answer
from service.schemas import Document

D = TypeVar("D", bound=Document)


class _Items(BaseModel, Generic[D]):
    items: list[D]


def document(model: type[D]) -> Callable[[Answer], D]:
    """Reads one document."""
    return lambda answer: model.model_validate_json(answer.body, extra="ignore")


def items(model: type[D]) -> Callable[[Answer], list[D]]:
    """Reads `{"items": [...]}`."""
    page = _Items[model]  # type: ignore[valid-type]  # a type made at run time
    return lambda answer: page.model_validate_json(answer.body, extra="ignore").items


def plain(answer: Answer) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: It is something else.
    """
    value = json.loads(answer.body)
    if not isinstance(value, dict):
        raise ValueError("not an object")  # noqa: TRY004 - the text is wrong, not a caller's type
    return value


def text(answer: Answer) -> str:
    """Reads text; bytes that are no UTF-8 are replaced."""
    return answer.body.decode(errors="replace")


def nothing(answer: Answer) -> None:
    """Passes over the body."""
