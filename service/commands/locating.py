"""Makes a configuration mean the same in another process: its relative paths are those of the working directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedisco_ray.config import LocalInit, RunConfig


def located(config: RunConfig, base: Path) -> dict[str, Any]:
    """The configuration as plain data with absolute paths.

    What was not set is left out, and so is `output` where it is the default: the service then chooses a directory of its own.

    Args:
        config: A checked configuration.
        base: What relative paths are relative to.
    """
    plain: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    for source in plain["corpus"]["sources"]:
        if source["path"] != "embedded" and "://" not in source["path"]:
            source["path"] = _absolute(base, source["path"])
    if config.tokenizer.path is not None:
        plain["tokenizer"]["path"] = _absolute(base, config.tokenizer.path)
    init = config.model.init
    if isinstance(init, LocalInit):
        plain["model"]["init"][init.KEY] = _absolute(base, init.directory)
    if config.output == RunConfig.model_fields["output"].default:
        plain.pop("output", None)
    else:
        plain["output"] = _absolute(base, config.output)
    return plain


def _absolute(base: Path, path: str | Path) -> str:
    # Without links and `..`: the service compares paths with its roots by their words first.
    return str((base / path).resolve())
