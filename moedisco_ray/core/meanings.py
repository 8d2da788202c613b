"""The docstrings under the fields of pydantic's models, as descriptions in their JSON schemas.

pydantic's own `use_attribute_docstrings` reads the source of every model when it is imported, which is a fifth of the
time in which a command starts; only schemas need it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def add_meanings(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Describe the fields of a JSON schema; pydantic calls it as `json_schema_extra`.

    A field without a docstring has that of the base class, where a section states another default alone.
    """
    classes = [each for each in model.__mro__ if issubclass(each, BaseModel) and each is not BaseModel]
    for name, field in schema.get("properties", {}).items():
        meaning = next(filter(None, (_meanings(each).get(name) for each in classes)), None)
        if meaning is not None:
            field.setdefault("description", meaning)


@functools.cache
def _meanings(model: type[BaseModel]) -> Mapping[str, str]:
    """The docstring under each field that a model's own class declares."""
    [declared] = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    found: dict[str, str] = {}
    for field, below in itertools.pairwise(getattr(declared, "body", [])):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                found[field.target.id] = inspect.cleandoc(text.value)
    return found
