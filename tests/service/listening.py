"""Which processes of a service listen for connections, and the table of docs/security.md that says where they may."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from service.ray_side.local import MARK

SECURITY = Path(__file__).resolve().parents[2] / "docs" / "security.md"


class Listener(NamedTuple):
    """A socket that accepts connections: the program's name and words, and the address without its port."""

    program: str
    address: str


def listeners(state_dir: Path, service: int) -> set[Listener]:
    """The sockets of a service's process, of its local Ray, and of everything that these started."""
    marked = f"{state_dir / 'ray'}"
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if process.pid == service or (
                MARK in environment and environment["RAY_AUTH_TOKEN_PATH"].startswith(marked)
            ):
                words = f"{process.name()} {' '.join(process.cmdline())}"
                connections = process.net_connections("tcp")
                found |= {
                    Listener(words, each.laddr.ip.removeprefix("::ffff:"))
                    for each in connections
                    if each.status == psutil.CONN_LISTEN
                }
    return found


def documented() -> Iterator[tuple[list[str], str]]:
    """Names of programs, and the address at which they listen, by row of the table."""
    section = SECURITY.read_text().split("## What listens where")[1].split("\n## ")[0]
    for line in section.splitlines():
        if line.startswith("| ") and "`" in line:
            _, programs, address, *_ = line.split("|")
            yield re.findall(r"`([^`]+)`", programs), address.split()[0]
