"""Output of the commands: JSON for programs, tables for people."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import typer
from pydantic_core import to_json
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from moedisco_ray.cli.app import INTERRUPTED
from moedisco_ray.cli.console import error_console, output_console, remark, say

__all__ = ["interruptible", "moment", "remark", "say", "transfer_bar", "write_json", "write_table"]


def write_json(value: Any) -> None:
    """Print models of the API, or lists and dictionaries of them, as JSON."""
    typer.echo(to_json(value, indent=2).decode())


def write_table(table: RenderableType) -> None:
    output_console().print(table)


def transfer_bar() -> Progress:
    """A progress bar of a download or upload, on standard error if that is a terminal."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=error_console(), disable=not sys.stderr.isatty())


@contextlib.contextmanager
def interruptible(note: Callable[[], str]) -> Iterator[None]:
    """End the command at Ctrl-C, with a note about what continues to run, or what was kept."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        remark(note())
        raise typer.Exit(INTERRUPTED) from interrupt


def moment(seconds: float | None) -> str:
    """Format seconds since the epoch as local date and time, to the minute; empty for None."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
