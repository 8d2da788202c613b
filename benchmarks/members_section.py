"""The section of RESULTS.md on members that train the whole MoE apart."""

from __future__ import annotations

from typing import Any

from benchmarks.page_parts import made_with, read, section, span, table


def members() -> str:
    result = read("members")
    rows = [
        [
            "joint" if row["members"] == 1 else f"{row['members']} members",
            "" if row["members"] == 1 else f"{row['every']}",
            f"{row['batch']:,}",
            f"{row['tokens'] // row['batch']:,}",
            span(row["loss"]),
            "" if row["members"] == 1 else span(row["gap"]),
            "" if row["bits_sent"] is None else f"{row['bits_sent']:.2f}",
        ]
        for row in result["rows"]
    ]
    swept = [[name, "diverged" if each["loss"] is None else f"{each['loss']:.4f}"] for name, each in _sweep(result)]
    return section(
        "Members that synchronise rarely",
        f"""Members train the whole MoE apart, on equal parts of each batch, and combine all weights every *every*
        steps; *joint* is one training on the same tokens. {result["setting"]["parameters"]} parameters, 16 experts,
        top-2, Muon, held-out nats on other text than the one for tuning, smallest, median and largest of
        {len(result["setting"]["seeds"])} seeds. *Bits* are sent per weight and sync, and as many received; 32 without
        codes. Models of this size do not say whether members pay: the gap's trend over batch, steps and syncs is what
        counts.""",
        table(["training", "every", "tokens per step", "steps", "loss", "above joint", "bits"], rows),
        "The sweep, on the corpus for tuning and one seed; a name has members, steps between syncs, rate, outer step:",
        table(["training", "loss"], swept),
        made_with(result),
    )


def _sweep(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(result["setting"]["sweep"].items())
