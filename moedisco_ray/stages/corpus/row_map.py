"""The function of a source that changes or drops its rows."""

from __future__ import annotations

import hashlib
import inspect
import traceback
from pathlib import Path
from typing import Any

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.core.user_code import imported

Row = dict[str, Any]


class RowMap:
    """A function that changes or drops rows, and the number of rows that it has dropped.

    Attributes:
        dropped: Number of rows that the function has dropped.

    Args:
        field: Configuration path of the source, such as `corpus.sources.0`; errors name it.
        name: The function, as MODULE:FUNCTION.

    Raises:
        ConfigError: The function cannot be imported.
    """

    def __init__(self, field: str, name: str) -> None:
        self.dropped = 0
        self._field, self._name = f"{field}.map", name
        try:
            self._function = imported(name)
        except Exception as error:  # importing runs the user's module, which may raise anything
            raise ConfigError(
                self._field,
                name,
                f"cannot be imported ({type(error).__name__}: {first_line(error)}); install its package on all "
                "machines that read text, or name its folder in PYTHONPATH there",
            ) from error
        if not callable(self._function):
            raise ConfigError(self._field, name, f"is a {type(self._function).__name__}, not a function; name one")

    def __call__(self, row: Row, path: str) -> Row | None:
        """The row to read instead of a row of the file at `path`; None if the function drops it.

        Raises:
            ConfigError: The function raises an error, or returns neither a row nor None.
        """
        try:
            found = self._function(row)
        except Exception as error:  # the user's function may raise anything
            *_, last = traceback.extract_tb(error.__traceback__)
            raise ConfigError(
                self._field,
                self._name,
                f"raises {type(error).__name__} at {Path(last.filename).name}:{last.lineno} for a row of "
                f"{path} ({first_line(error)}); correct the function, or let it return None for such rows",
            ) from error
        if found is None:
            self.dropped += 1
            return None
        if not isinstance(found, dict):
            raise ConfigError(
                self._field,
                self._name,
                f"returns {type(found).__name__} for a row of {path}; return a dict, or None to drop it",
            )
        return found

    def identity(self) -> str:
        """Digest of the code of the module that defines the function; empty if it has no Python code."""
        module = inspect.getmodule(inspect.unwrap(self._function))
        try:
            code = inspect.getsource(module) if inspect.ismodule(module) else ""
        except (OSError, TypeError):  # it is built in, or compiled
            return ""
        return hashlib.sha256(code.encode()).hexdigest() if code else ""
