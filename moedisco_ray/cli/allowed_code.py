"""Ask before a run calls functions that its configuration names: they can do whatever the user can do."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

import typer

from moedisco_ray.cli.console import remark
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.user_code import UserFunction, check_allowed, is_listed, offer_folder, user_functions


def allowed_functions(config: RunConfig, folder: Path, listed: Collection[str]) -> list[str]:
    """Names of the functions that a run may call: those listed, and on a terminal those that the user agrees to.

    Modules of the configuration's folder can be imported afterwards, by this process and by those that it starts.

    Args:
        config: The configuration.
        folder: Folder of the configuration's file.
        listed: Values of `--allow-code`.

    Raises:
        ConfigError: A function is not allowed, or cannot be found.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        check_allowed(config, listed)
    found = user_functions(config, folder)
    asked = [each for each in found if not is_listed(each.name, listed)]
    if asked:
        _ask(asked)
    for place in dict.fromkeys(each.folder for each in found if each.folder is not None):
        offer_folder(place)
    return [each.name for each in found]


def _ask(functions: list[UserFunction]) -> None:
    for each in functions:
        remark(f"{each.field}: the run would call {each.name} of {each.file}")
    # A package's code is long, and the user has installed it; any other file may be anybody's.
    shown = {file: source for each in functions if not each.is_installed for file, source in each.code.items()}
    for file, source in shown.items():
        remark(f"{file} holds:")
        typer.echo(f"\n{source.strip()}\n", err=True)
    if not typer.confirm("This code can do whatever you can do. Run it?", err=True):
        raise ConfigError(
            functions[0].field,
            functions[0].name,
            f"was not allowed; remove it, or allow it with --allow-code {functions[0].name}",
        )
