"""One look for every table."""

from __future__ import annotations

from rich import box
from rich.table import Table


def plain_table(first: str, *others: str) -> Table:
    """A table without a frame: names on the left, numbers on the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), header_style="dim", show_edge=False)
    table.add_column(first, no_wrap=True)
    for title in others:
        table.add_column(title, justify="right")
    return table
