"""The section of RESULTS.md on streamed training."""

from __future__ import annotations

from typing import Any

from benchmarks.page_parts import at_least, at_most, made_with, number, prose, read, section, span, table


def streamed_timeline() -> str:
    result = read("streamed_timeline")
    setting, targets = result["setting"], result["targets"]
    cells = [(shape, card, cell) for shape, cards in result["rows"].items() for card, cell in cards.items()]
    one = [[shape, card, *_on_one_card(cell)] for shape, card, cell in cells]
    box = [[shape, card, *_in_a_box(cell)] for shape, card, cell in cells]
    hosts = [[shape, card, *_shares(cell["hosts"])] for shape, card, cell in cells]
    names = list(cells[0][2]["hosts"])
    verdicts = [
        at_most(f"measured over planned seconds, minus 1: {name}", _error(each), targets["check"])
        for name, each in result["check"].items()
    ]
    return section(
        "Streamed training, planned",
        f"""Weights and optimizer state in the host's memory, one layer at a time on the card. A
        step of {setting["tokens"]:,} tokens on one card, in bf16 with Muon and recomputed layers, at
        {setting["utilisation"]:.0%} of the card's peak. *Share kept*: the time without any copies divided by the
        planned time. *Tokens*: per step, from which {targets["least"]:.0%} and {targets["goal"]:.0%} are kept. Go: at
        least {targets["least"]:.0%}, and the host's memory is large enough. Faster arithmetic hides fewer copies, so a
        card that reaches less of its peak keeps more. The machines are in the setting below; speeds are assumed from
        data sheets.""",
        table(
            [
                "model",
                "card",
                "computing, s",
                "Muon's part of it, relative to the rest",
                "streamed, s",
                "share kept",
                "tokens for 85 / 95 %",
                "host memory, GiB",
                "",
            ],
            one,
        ),
        prose(
            f"""A box of {setting["cards_of_a_box"]} cards with one shared copy, at {setting["box_tokens"]:,} tokens per
            step: share kept by each division of the work, the fastest one, and its hours relative to one A100-80GB
            with enough memory."""
        ),
        table(["model", "card", "data", "layers", "experts", "fastest", "a step, s", "hours / A100", ""], box),
        prose(
            f"""Machines with one card each, the layers divided among them, at {setting["tokens"]:,} tokens per step:
            share kept of the speed of as many cards without copies."""
        ),
        table(["model", "card", *names], hosts),
        "The arithmetic against three threads whose copies sleep by bytes and speed:",
        "\n".join(verdicts),
        made_with(result),
    )


def streamed_host() -> str:
    result = read("streamed_host")
    over = {name: each - 1 for name, each in result["over_plan"].items()}
    return section(
        "Host memory of streamed training",
        f"""A training of {result["setting"]["parameters"] / 1e9:.2f} billion parameters in bf16 with AdamW on a CPU,
        from a process with its libraries to the written model: bytes of the process's own memory per parameter. The
        plan has {result["planned_of_host"]:.2f} bytes for the host, weights, gradients, moments and the inputs of the
        layers, and the rest for the card, because a CPU has both in one memory.""",
        table(
            ["", "bytes per parameter"],
            [
                ["measured", span(result["bytes_per_parameter"]["streamed"])],
                ["planned, host and card", number(result["planned"])],
            ],
        ),
        at_most("measured over planned, minus 1", over, result["target"]),
        made_with(result),
    )


def streamed_cards() -> str:
    result = read("streamed_cards")
    setting, planned = result["setting"], result["planned"]
    relative = {name: each / planned for name, each in result["speed_up"].items()}
    return section(
        "Streamed training on two cards, imitated",
        f"""Seconds of a streamed step of {setting["tokens"]:,} tokens in {setting["micro_batches"]} micro-batches with
        {setting["num_hidden_layers"]} layers, on one CPU thread and on two that divide the layers, the head and the
        update as two cards would. No copy over a slot is measured, and no GPU: only whether the cards wait for each
        other. Without copies, the plan has {planned:.2f} times the speed.""",
        table(["cards", "s per step"], [[cards, span(each)] for cards, each in result["seconds"].items()]),
        at_least("speed-up relative to the planned one", relative, result["target"]),
        made_with(result),
    )


def _on_one_card(cell: dict[str, Any]) -> list[str]:
    return [
        number(cell["computing"]),
        f"{cell['muon']:.0%}",
        number(cell["seconds"]),
        f"{cell['kept']:.3f}",
        " / ".join(f"{tokens:,}" for tokens in cell["tokens"].values()),
        number(cell["host_gb"]),
        cell["verdict"],
    ]


def _in_a_box(cell: dict[str, Any]) -> list[str]:
    return [
        *_shares(cell["box"]),
        cell["box_division"],
        number(cell["box_seconds"]),
        f"{cell['hours_of_a100']:.2f}",
        cell["box_verdict"],
    ]


def _shares(found: dict[str, float]) -> list[str]:
    return [f"{share:.3f}" for share in found.values()]


def _error(ratio: dict[str, float]) -> dict[str, float]:
    return {name: abs(each - 1) for name, each in ratio.items()}
