"""The section of RESULTS.md on members that train the whole MoE apart."""

from __future__ import annotations

from benchmarks.page_parts import made_with, read, section, table


def members() -> str:
    result = read("members")
    rows = [
        [
            "joint" if row["members"] == 1 else f"{row['members']} members",
            "" if row["members"] == 1 else f"{row['every']}",
            f"{row['batch']:,}",
            f"{row['tokens'] // row['batch']:,}",
            _nats(row["loss"]),
            "" if row["members"] == 1 else _nats(row["gap"]),
            "" if row["bits_sent"] is None else f"{row['bits_sent']:.2f}",
        ]
        for row in result["rows"]
    ]
    swept = [[name, "diverged" if loss is None else f"{loss:.3f}"] for name, loss in result["sweep"].items()]
    return section(
        "Members that synchronise rarely",
        f"""Members train the whole MoE apart, on equal parts of each batch, and combine all weights every *every*
        steps; *joint* is one training on the same tokens. {result["setting"]["parameters"]} parameters, 16 experts,
        top-2, Muon, held-out nats on other text than the one for tuning; seeds {result["setting"]["seeds"]}. *Bits* are
        sent per weight and sync, and as many received; 32 without codes. Models of this size do not say whether members
        pay: the gap's trend over batch, steps and syncs is what counts.""",
        table(["training", "every", "tokens per step", "steps", "loss", "above joint", "bits"], rows),
        "The sweep, on the corpus for tuning and one seed; a name has members, steps between syncs, rate, outer step:",
        table(["training", "loss"], swept),
        made_with(result),
    )


def _nats(values: dict[str, float]) -> str:
    least, median, most = (f"{values[name]:.3f}" for name in ("min", "median", "max"))
    return median if least == most else f"{median} ({least} to {most})"
