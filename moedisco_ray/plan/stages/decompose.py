"""Cost of the decomposition: a node with a free CPU writes the sub-models, whose backbone is stored once."""

from __future__ import annotations

from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.reading import Reading, StageEstimate
from moedisco_ray.plan.stage_cost import StageCost


def _estimate(reading: Reading) -> StageEstimate:
    return reading.on_head("decompose", reading.starting(None) if reading.config.tokens.decoupled else 0.0)


def _storage(files: Files) -> StageStorage | None:
    parts = files.trained.get("submodels")
    if parts is None:
        return None
    every = parts.units * parts.weights
    stored = min(files.whole, every) if "finetune" in files.trained else every
    return files.starts("decompose", read=parts.weights, stored=stored)


COST = StageCost(_estimate, _storage)
