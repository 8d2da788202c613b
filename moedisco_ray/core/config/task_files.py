"""Task files for lm-eval, checked before a run trains anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.read_roots import opened

Rows = list[dict[str, Any]]

_KINDS = "write an object with query, choices and gold, or with context and continuation"


def read_task_file(field: str, path: Path) -> Rows:
    """Read the examples of a JSON Lines file.

    All examples in a file have the same one of these two forms, with no other keys.

    * `query`, two or more `choices`, and `gold`, the index of the right choice from 0. If the query begins with
      `Question:`, the model sees a line `Answer:` before the choice; otherwise the choice directly continues the query.
    * `context` and `continuation`: the answer is right if the model would generate the continuation.

    Args:
        field: Setting that names the file, for errors.
        path: The task file.

    Raises:
        ConfigError: The file cannot be read, or a line does not have the form of the first one.
    """
    try:
        with opened(path) as found:
            # Not splitlines(): a JSON string may contain other line separators, such as U+2028.
            lines = found.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(field, str(path), "is not a text file") from error
    rows: Rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _example(line)
        if row is None:
            raise ConfigError(field, str(path), f"line {number} is no example: {_KINDS}")
        if rows and row.keys() != rows[0].keys():
            raise ConfigError(field, str(path), f"line {number} has another form than line 1; split the file in two")
        rows.append(row)
    if not rows:
        raise ConfigError(field, str(path), "holds no examples")
    return rows


def _example(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match row:
        case {"query": str(query), "choices": [str(), str(), *_] as choices, "gold": int(gold)} if (
            query.strip()
            and all(isinstance(choice, str) and choice.strip() for choice in choices)
            and 0 <= gold < len(choices)
        ):
            return {"query": query, "choices": choices, "gold": gold}
        case {"context": str(context), "continuation": str(continuation)} if context.strip() and continuation.strip():
            return {"context": context, "continuation": continuation}
    return None
