"""The output of the command line.

What others wrote reaches a terminal only through the streams and consoles of this module.

A run's report, a service's answer or a file's name may contain escape sequences that clear the screen or write the
clipboard. The streams show control characters as escapes, also for libraries that print. Only rich's consoles write
escape sequences, their own: they escape the text that they are given.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from moedisco_ray.core.printable import one_line, printable

_PIPE_WIDTH = 120
"""Width of output in a pipe (characters): enough for the tables."""
_COLOUR = re.compile("\x1b\\[[0-9;]*m")


class PrintableConsole(Console):
    """A console of rich that shows control characters of its content as escapes, and interprets no markup in it.

    Args:
        stream: The stream to write to.
        width: Width in characters; by default that of the terminal.
    """

    def __init__(self, stream: IO[str], width: int | None = None) -> None:
        super().__init__(file=stream, width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; everything that a console shows passes here."""
        if isinstance(renderable, Text) and printable(renderable.plain) != renderable.plain:
            # Escapes need room, so a text is replaced before it is wrapped. It loses the styles of its parts.
            renderable = Text(
                printable(renderable.plain),
                renderable.style,
                justify=renderable.justify,
                overflow=renderable.overflow,
                no_wrap=renderable.no_wrap,
                end=renderable.end,
            )
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string into text that can be styled."""
        return super().render_str(printable(text), **options)


def output_console() -> PrintableConsole:
    """A console on the standard output; in a pipe it is wide enough for tables."""
    # Keep the current sys.stdout: during a run, sys.stdout is redirected to the file of Ray's output.
    return PrintableConsole(sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def error_console() -> PrintableConsole:
    return PrintableConsole(sys.stderr)


def say(line: str) -> None:
    """Print one line without markup or wrapping."""
    print(one_line(line))


def say_text(text: str) -> None:
    """Print a text of any number of lines, without the colours that a program may have given it."""
    print(_COLOUR.sub("", text), end="" if text.endswith("\n") else "\n")


def remark(line: str) -> None:
    """Print one line on the standard error, so that it does not mix with piped output."""
    print(f"moedisco: {one_line(line)}", file=sys.stderr)
