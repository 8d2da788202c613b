"""Cost of the decomposition: a node with a free CPU writes the sub-models, whose backbone is stored once.

Of a trained MoE, a worker of the sub-models' pool first measures which experts each cluster selects.
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
    if not derived.experts_by_use(config):
        return reading.on_head("decompose", reading.starting(None))
    measuring = reading.divided(
        "decompose",
        pool,
        total([reading.passes(derived.use_tokens(config), whole=True, pool=pool), reading.starting(pool)]),
    )
    writing = reading.starting(None)
    if measuring.seconds is None or writing is None:
        return measuring
    return measuring.model_copy(update={"seconds": measuring.seconds + writing, "unbilled_seconds": writing})


def _storage(files: Files) -> StageStorage | None:
    parts = files.trained.get("submodels")
    if parts is None:
        return None
    every = parts.units * parts.weights
    stored = min(files.whole, every) if "finetune" in files.trained else every
    return files.starts("decompose", read=parts.weights, stored=stored)


def _works(streams: Streams) -> Iterator[Work]:
    config, pool = streams.config, streams.config.pools.low_memory
    if derived.experts_by_use(config):
        yield Work(
            "decompose",
            pool,
            "merge.calibration_tokens",
            derived.use_tokens(config),
            lambda tokens: streams.evaluation(pool, tokens),
        )


COST = StageCost(_estimate, _storage, _works)
