"""Cost of the decomposition: a node with a free CPU writes the sub-models, whose backbone is stored once.

Those of a trained MoE are written by a worker of the sub-models' pool: it runs a sample of text through the MoE, and
through the sub-models.
"""

from __future__ import annotations

from collections.abc import Iterator

from moedisco_ray.core.config import derived
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.reading import Reading, StageEstimate, total
from moedisco_ray.plan.stage_cost import StageCost, Work
from moedisco_ray.plan.stage_memory import Streams


def _estimate(reading: Reading) -> StageEstimate:
    config, pool = reading.config, reading.config.pools.low_memory
    if not config.tokens.decoupled:
        return reading.on_head("decompose", 0.0)
    if not derived.measures_cut(config):
        return reading.on_head("decompose", reading.starting(None))
    tokens = derived.use_tokens(config)
    passes = [reading.passes(tokens, whole=whole, pool=pool) for whole in (True, False)]
    return reading.divided("decompose", pool, total([*passes, reading.starting(pool)]))


def _storage(files: Files) -> StageStorage | None:
    parts = files.trained.get("submodels")
    if parts is None:
        return None
    every = parts.units * parts.weights
    stored = min(files.whole, every) if "finetune" in files.trained else every
    if not derived.measures_cut(files.config):
        return files.starts("decompose", read=parts.weights, stored=stored)
    return files.starts("decompose", read=files.whole, stored=stored, pool=files.config.pools.low_memory.name)


def _works(streams: Streams) -> Iterator[Work]:
    config, pool = streams.config, streams.config.pools.low_memory
    if derived.measures_cut(config):
        yield Work(
            "decompose",
            pool,
            "merge.calibration_tokens",
            derived.use_tokens(config),
            lambda tokens: streams.evaluation(pool, tokens),
        )


COST = StageCost(_estimate, _storage, _works)
