"""What an evaluation found, as text: the rows, tables and sentences that a terminal and a model card show alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TASK_COLUMNS = ("task", "accuracy", "by length", "chance", "examples")


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """What was measured on text, by name: the validation text as a whole and per source, and text that was never trained on."""
    unseen = evaluation.get("unseen", {"sources": []})
    return [
        *([("all", evaluation)] if "perplexity" in evaluation else []),
        *([("sub-models as an ensemble", evaluation["ensemble"])] if "ensemble" in evaluation else []),
        *((entry["source"], entry) for entry in evaluation.get("sources", [])),
        *([("all, never trained on", unseen)] if len(unseen["sources"]) > 1 else []),
        *((f"{entry['source']}, never trained on", entry) for entry in unseen["sources"]),
    ]


def task_table(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What lm-eval found, as text; standard errors after the shares.

    Returns:
        Rows of `TASK_COLUMNS`.
    """
    return [
        (
            entry["task"], _share(entry["acc"], entry["acc_stderr"]), _share(entry["acc_norm"], entry["acc_norm_stderr"]),
            _share(entry["chance"]), f"{entry['examples']:,}",
        )
        for entry in evaluation.get("lm_eval", [])
    ]


def expert_note(evaluation: Mapping[str, Any]) -> str | None:
    """How far experts are specialised and how many are dead, in a sentence; None where nobody looked."""
    found = evaluation.get("specialisation")
    if not found:
        return None
    told = ", ".join(f"{value:.2f} of the {label}" for label, value in found.items() if value is not None)
    routers = evaluation["routers"]
    dead, experts = sum(router["dead"] for router in routers), sum(len(router["load"]) for router in routers)
    knowing = f"a document's main expert tells {told} (normalised mutual information); " if told else ""
    return f"{knowing}{dead} of {experts} experts are dead (under 1 % of an even load)"


def _share(value: float | None, error: float | None = None) -> str:
    return "-" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")
