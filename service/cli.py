"""The `moedisco` command line: the training commands and the service's commands."""

from __future__ import annotations

import typer

from moedisco_ray.cli.app import Commands, options
from moedisco_ray.cli.app import app as training
from service.commands import commands

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=training.info.help,
    callback=options,
    no_args_is_help=True,
)
app.registered_commands += training.registered_commands
app.add_typer(commands)


def main() -> None:
    """Run the command line."""
    app(prog_name="moedisco")
