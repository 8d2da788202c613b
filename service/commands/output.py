"""How commands write: JSON for programs, tables for people."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import typer
from pydantic_core import to_json
from rich.console import RenderableType

from moedisco_ray.cli.app import INTERRUPTED, output_console


def write_json(value: Any) -> None:
    """Write documents, lists and dictionaries of them, as JSON."""
    typer.echo(to_json(value, indent=2).decode())


def write_table(table: RenderableType) -> None:
    """Write what rich draws."""
    output_console().print(table)


def say(line: str) -> None:
    """Write one line as it stands."""
    typer.echo(line)


def remark(line: str) -> None:
    """Say something beside the output, so that a pipe does not carry it."""
    typer.echo(f"moedisco: {line}", err=True)


@contextlib.contextmanager
def leaving(what_goes_on: str) -> Iterator[None]:
    """Let Ctrl-C end the command, with a remark on what it does not end."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        remark(what_goes_on)
        raise typer.Exit(INTERRUPTED) from interrupt


def moment(seconds: float | None) -> str:
    """A time as the local calendar and clock have it; empty for none."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
