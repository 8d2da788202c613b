"""Makes a configuration mean the same in another process: its relative paths are those of the working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import Place, names_a_run, with_places

_DEFAULT_OUTPUT = RunConfig.model_fields["output"].default


def located(config: RunConfig, base: Path) -> dict[str, Any]:
    """The configuration as plain data with absolute paths.

    What was not set is left out, and so is `output` where it is the default: the service then chooses a directory of its own.

    Args:
        config: A checked configuration.
        base: What relative paths are relative to.
    """
    def change(place: Place) -> str | Path:
        path = str(place.value)
        remote = not isinstance(place.value, Path) and ("://" in path or path == "embedded")
        if remote or names_a_run(path) or (place.field == "output" and place.value == _DEFAULT_OUTPUT):
            return place.value
        # Without links and `..`: the service compares paths with its roots by their words first.
        return type(place.value)((base / path).resolve())

    plain: dict[str, Any] = with_places(config, change).model_dump(mode="json", exclude_unset=True)
    if config.output == _DEFAULT_OUTPUT:
        plain.pop("output", None)
    return plain
