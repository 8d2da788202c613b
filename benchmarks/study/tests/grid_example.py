"""Hand-made results of the grid, and a folder of tiny corpora."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.compare.records import TunedSettings
from benchmarks.study.grid import cells, summary
from benchmarks.study.grid.cells import TUNING_CORPUS, Cell
from benchmarks.study.grid.records import Figures, Made, Phase, PieceResult

MADE = Made(
    command="grid", commit="a1", date="2026-01-01", processor="P", cores=2, versions={"torch": "2"}, seconds=1.0
)
JOINT = (Phase(pool="high_memory", flops=1000.0, workers=1.0),)
OURS = (Phase(pool="low_memory", flops=900.0, workers=4.0), Phase(pool="high_memory", flops=100.0, workers=1.0))
_WORDS = {
    "report": ["river", "stone", "bread", "winter", "letter", "garden", "market", "shadow"],
    TUNING_CORPUS: ["proof", "lemma", "integer", "vector", "kernel", "function", "branch", "commit"],
}
TUNED = TunedSettings(batch_tokens=256, lr=1e-3, schedule="wsd", trainings=4, slice_tokens=1280)


def cell(**changes: Any) -> Cell:
    return Cell(
        **{
            "corpus": "report",
            "family": "qwen3_moe",
            "start": "random",
            "experts": 16,
            "top_k": 2,
            "budget": 1,
            "scale": "smoke",
            **changes,
        }
    )


def piece(arm: str, loss: float, *, seed: int = 0, phases: Sequence[Phase] = JOINT, **changes: Any) -> PieceResult:
    return PieceResult(
        cell=cell(**changes),
        arm=arm,
        seed=seed,
        loss=loss,
        bits_per_byte=None,
        unseen_perplexity=None,
        phases=tuple(phases),
        recipe={},
        tuned=None,
        made=MADE,
    )


def write_corpora(folder: Path) -> Path:
    """Two corpora of two domains, each a few hundred short documents."""
    rng = random.Random(0)
    for corpus, words in _WORDS.items():
        for half, domain in enumerate(("first", "second")):
            (folder / corpus).mkdir(parents=True, exist_ok=True)
            own = words[4 * half : 4 * half + 4]
            documents = [" ".join(rng.choices(own, k=60)) + f" {number}" for number in range(120)]
            (folder / corpus / f"{corpus}_{domain}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return folder


def by_arm(results: list[PieceResult]) -> dict[tuple[str, int], Figures]:
    return {(entry.arm, entry.budget_tokens // cells.SMOKE.tokens): entry for entry in summary.summarise(results)}
