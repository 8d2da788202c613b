"""The section of RESULTS.md on syncs."""

from __future__ import annotations

import itertools

from benchmarks.page_parts import made_with, number, read, section, table

_COLUMNS = {
    "seconds": "s per sync",
    "network_seconds": "s at 1 Gbit/s",
    "member_mb": "MB per member",
    "member_cpu_seconds": "CPU s per member",
    "head_mb": "MB through the head",
    "head_memory_mb": "head's memory, MB",
}
PARTS = ("publish", "combine", "load", "head")


def syncs() -> str:
    result = read("syncs")
    rows, parts = [], []
    for cell, arm in itertools.product(result["cells"], ("old", "new")):
        found = cell[arm]
        heading = [f"{cell['members']} of {cell['megabytes']:,} MB", arm]
        rows.append([*heading, *(number(found["all"][name]) for name in _COLUMNS)])
        parts.append([*heading, *(number(found[part]["seconds"]) if part in found else "" for part in PARTS)])
    slopes = [
        [arm, number(1000 * result["slopes"][arm]["seconds"]), number(1000 * result["slopes"][arm]["network_seconds"])]
        for arm in ("old", "new")
    ]
    equal = all(cell["equal_bits"] for cell in result["cells"])
    return section(
        "A sync of many members",
        f"""The second sync of members with float32 weights, on files of one machine. *old*: one process on the head
        combines the weights. *new*: each member combines a range of all members' weights. Each member's work is
        measured alone, one member after the other, as if each had a machine of its own; *s per sync* adds up the
        slowest publication, the head's work, the slowest range and the slowest load. The head's seconds include the
        deletion of the members' files, for which no member waits. The machine had other work, more of it
        at some times than at others, so seconds of the two arms compare only roughly; CPU seconds and bytes compare
        better. What the old head reads from mapped files follows from their sizes. Files come from the page cache, so
        these seconds are of the processor and of writes to one disk: no network is in them. *s at 1 Gbit/s* is what the
        bytes alone take where each machine, the head too, reaches storage at 125 MB/s; requests of an object store come
        on top. *MB* are read plus written. The head's memory is what it takes during the sync, without mapped files.
        The common weights of both are {"the same bits" if equal else "**different**"}.""",
        table(["members", "arm", *_COLUMNS.values()], rows),
        table(["seconds", "arm", *PARTS], parts),
        table(["per further member of 64 MB", "ms per sync", "ms at 1 Gbit/s"], slopes),
        made_with(result),
    )
