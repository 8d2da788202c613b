"""The settings of a configuration model that may name places, found in the model itself."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from moedisco_ray.core.config.places import Marker


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, Marker | None]]:
    """Every value that a model may hold: its dotted path (`*` for an entry of a list), its type and its marker."""
    for name, info in model.model_fields.items():
        marker = next((mark for mark in info.metadata if isinstance(mark, Marker)), None)
        yield from _leaves(info.annotation, prefix + name, marker)


def _leaves(hint: Any, field: str, marker: Marker | None) -> Iterator[tuple[str, Any, Marker | None]]:
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield from leaves(hint, f"{field}.")
    elif get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        yield from _leaves(inner, field, next((mark for mark in metadata if isinstance(mark, Marker)), marker))
    elif get_origin(hint) is typing.Literal:
        return
    elif get_args(hint):
        many = get_origin(hint) in (tuple, list, dict, set, frozenset)
        for part in get_args(hint):
            if part is not ...:
                yield from _leaves(part, f"{field}.*" if many else field, marker)
    else:
        yield field, hint, marker


def may_name_a_place(hint: Any) -> bool:
    """Whether a type holds text or a path, or anything at all."""
    return hint in (Any, object, bytes) or (isinstance(hint, type) and issubclass(hint, (str, Path)))


def marked(model: type[BaseModel]) -> dict[str, tuple[Any, Marker]]:
    """Type and marker of each marked setting, by its dotted path."""
    return {field: (hint, marker) for field, hint, marker in leaves(model) if marker is not None}
