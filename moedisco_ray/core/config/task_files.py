"""Task files: examples for lm-eval, checked before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.read_roots import opened

Rows = list[dict[str, Any]]

_KINDS = "an object with query, choices and gold, or with context and continuation, is wanted"


def read_task_file(field: str, path: Path) -> Rows:
    """The examples of a JSON Lines file, all of one kind, without other keys.

    * `query`, at least two `choices`, `gold`: the place of the right choice, from 0. A query that begins with `Question:` is
      followed by `Answer:` on a line of its own, any other is continued by the choice.
    * `context`, `continuation`: right where the continuation is what the model would write.

    Args:
        field: Where the file is configured; errors name it.
        path: The file.

    Raises:
        ConfigError: It cannot be read, or a line is no example of the first line's kind.
    """
    try:
        with opened(path) as found:
            lines = found.read_text(encoding="utf-8").split("\n")    # a string may hold what Python takes for another line's end
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
            raise ConfigError(field, str(path), f"line {number} is of another kind than the first; make two files of it")
        rows.append(row)
    if not rows:
        raise ConfigError(field, str(path), "holds no examples")
    return rows


def _example(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    match row:
        case {"query": str(query), "choices": [str(), str(), *_] as choices, "gold": int(gold)} if (
                query.strip() and all(isinstance(choice, str) and choice.strip() for choice in choices)
                and 0 <= gold < len(choices)):
            return {"query": query, "choices": choices, "gold": gold}
        case {"context": str(context), "continuation": str(continuation)} if context.strip() and continuation.strip():
            return {"context": context, "continuation": continuation}
    return None
