"""Cost of the merge: all sub-models are read, each with its whole backbone, and the routers are calibrated.

Calibration reads its tokens once per layer, on average through half of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator

from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.reading import Reading, StageEstimate, total
from moedisco_ray.plan.stage_cost import StageCost, Work
from moedisco_ray.plan.stage_memory import Streams


def _estimate(reading: Reading) -> StageEstimate:
    config = reading.config
    # Each layer runs once without its experts, to compute its router's input. Then each layer but the last runs again,
    # in full.
    calibrated = round(config.merge.calibration_tokens * (2 - 1 / config.model.architecture.num_hidden_layers))
    work = reading.passes(calibrated, whole=True) if config.tokens.decoupled or config.tokens.seed else 0.0
    pool = config.finetune_pool
    return reading.divided("merge", pool, total([work, reading.starting(pool)]))


def _storage(files: Files) -> StageStorage:
    parts = files.earlier
    each = 0 if parts is None else parts.weights + (parts.handed_over if files.kept else 0)
    return files.models("merge", read=0 if parts is None else parts.units * each, stored=files.whole + files.kept)


def _works(streams: Streams) -> Iterator[Work]:
    config, pool = streams.config, streams.config.finetune_pool
    if config.tokens.decoupled or config.tokens.seed:
        yield Work(
            "merge",
            pool,
            "merge.calibration_tokens",
            config.merge.calibration_tokens,
            lambda tokens: streams.calibration(pool, tokens),
        )


COST = StageCost(_estimate, _storage, _works)
