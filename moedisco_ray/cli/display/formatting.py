"""Formats that all views share: numbers, shares, tables and common phrases.

`core.records.bill` formats durations and dollars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_ANY_WIDTH = 10_000
_LEAST_WIDTH = 4
"""Least width of a column, so that its title is readable."""


def count(number: float) -> str:
    """Format a count with three digits and a suffix: `812`, `1.20M`, `14.3B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            value = number / size
            return f"{value:.{max(0, 2 - int(math.log10(max(1.0, abs(value) * 1.0005))))}f}{unit}"
    return f"{number:.0f}"


def gigabytes(size: float) -> str:
    """Bytes in GiB, the unit of the memory that torch reports."""
    value = size / 2**30
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share between 0 and 1 as a whole percentage."""
    return f"{100 * share:.0f} %"


class PlainTable(Table):
    """A table without a frame: names on the left, numbers on the right.

    Where the terminal is too narrow, titles, names and durations wrap, and numbers lose no digit.
    """

    def __init__(self, first: str, *others: str) -> None:
        super().__init__(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
        self.add_column(first, overflow="fold")
        for title in others:
            self.add_column(title, justify="right", overflow="fold")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the table; if it is too wide for the terminal, columns of single words are as wide as the longest."""
        if Measurement.get(console, options.update(max_width=_ANY_WIDTH), self).maximum > options.max_width:
            for column in self.columns[1:]:
                cells = [str(cell) for cell in column.cells]
                if not any(" " in cell for cell in cells):
                    column.width = max([_LEAST_WIDTH, *map(cell_len, cells)])
        yield from super().__rich_console__(console, options)


def let_go(data: Mapping[str, Any]) -> str:
    """A sentence about the training of a `unit_let_go` event, for which the run no longer waits."""
    taken = f"its checkpoint of step {data.get('steps', 0)}" if data.get("contribution") == "checkpoint" else "its seed"
    return f"not waited for, the merge takes {taken}: {data.get('reason', '')}"


def stage_progress(data: Mapping[str, Any]) -> str:
    """The progress in a `stage_progress` event in words, such as `1.20M of 2.00M tokens evaluated`."""
    done, total = count(data.get("done", 0)), data.get("total")
    return f"{done} of {count(total)} {data.get('unit', '')}" if total else f"{done} {data.get('unit', '')}"
