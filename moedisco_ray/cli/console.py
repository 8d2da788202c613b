"""The console of the command line."""

from __future__ import annotations

import sys

from rich.console import Console

_PIPE_WIDTH = 120
"""Width of output in a pipe (characters): enough for the tables."""


def output_console() -> Console:
    """A console on the standard output; in a pipe it is wide enough for tables."""
    # Keep the current sys.stdout: during a run, sys.stdout is redirected to the file of Ray's output.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False)
