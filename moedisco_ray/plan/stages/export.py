"""Cost of the export: the finished model is copied, and generates samples from the prompts.

Where only the evaluation finds out whether the sub-models stay apart, the larger of the two costs counts. An ensemble
needs no more memory than the merged model: one layer of one sub-model is loaded at a time, and its router is on the
CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from moedisco_ray.core.config.apart import apart_choice
from moedisco_ray.core.limits import SAMPLE_TOKENS
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.reading import Reading, StageEstimate, total
from moedisco_ray.plan.stage_cost import StageCost, Work
from moedisco_ray.plan.stage_memory import Streams


def _seconds(reading: Reading) -> float | None:
    """Seconds that one worker needs for the export."""
    config = reading.config
    tokens = len(config.evaluation.prompts) * SAMPLE_TOKENS
    samples = reading.passes(tokens, whole=True)
    if apart_choice(config) != "never":
        apart = reading.passes(config.cluster_count * tokens, whole=False)
        samples = None if samples is None or apart is None else max(samples, apart)
    return total([samples, reading.starting(config.finetune_pool)])


def _estimate(reading: Reading) -> StageEstimate:
    return reading.divided("export", reading.config.finetune_pool, _seconds(reading))


def _storage(files: Files) -> StageStorage:
    size, parts, seed = files.whole, files.trained.get("submodels"), files.trained.get("seed")
    if parts is not None and apart_choice(files.config) != "never":
        # The ensemble's router has the model whose hidden states are the documents' vectors.
        read_by_router = parts.weights if seed is None else seed.weights
        size = max(size, parts.units * parts.weights + (read_by_router if files.config.vectors_pool else 0))
    return files.models("export", read=size, stored=size)


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
