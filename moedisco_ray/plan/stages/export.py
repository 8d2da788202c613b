"""Cost of the export: the finished model is copied, and generates samples from the prompts."""

from __future__ import annotations

from collections.abc import Iterator

from moedisco_ray.core.limits import SAMPLE_TOKENS
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.reading import Reading, StageEstimate, total
from moedisco_ray.plan.stage_cost import StageCost, Work
from moedisco_ray.plan.stage_memory import Streams


def _seconds(reading: Reading) -> float | None:
    """Seconds that one worker needs for the export."""
    samples = reading.passes(len(reading.config.evaluation.prompts) * SAMPLE_TOKENS, whole=True)
    return total([samples, reading.starting(reading.config.finetune_pool)])


def _estimate(reading: Reading) -> StageEstimate:
    return reading.divided("export", reading.config.finetune_pool, _seconds(reading))


def _storage(files: Files) -> StageStorage:
    return files.models("export", read=files.whole, stored=files.whole)


def _works(streams: Streams) -> Iterator[Work]:
    evaluation, pool = streams.config.evaluation, streams.config.finetune_pool
    if evaluation.prompts:
        yield Work(
            "export",
            pool,
            "evaluation.prompts",
            SAMPLE_TOKENS,
            lambda tokens: streams.generation(pool, tokens),
            remedy="evaluation.prompts=[]",
        )


COST = StageCost(_estimate, _storage, _works)
