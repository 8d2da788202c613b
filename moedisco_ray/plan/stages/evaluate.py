"""Cost of the evaluation: each measured model, and the one that assigns documents to clusters, reads validation tokens.

The finished model also reads those of `evaluation.sources`. For an ensemble, all sub-models read the tokens, and
computing the ensemble's weights takes more forward passes. The finished model, the merged one, the seed and all
sub-models are read from storage.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from moedisco_ray.core.config.apart import apart_choice
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.reading import Reading, StageEstimate, total
from moedisco_ray.plan.stage_cost import StageCost, Work
from moedisco_ray.plan.stage_memory import Streams, ensemble_contexts


def _seconds(reading: Reading) -> float | None:
    """Seconds that the evaluation takes one worker."""
    config, evaluation = reading.config, reading.config.evaluation
    tokens = evaluation.max_tokens
    passes = [reading.passes(tokens, whole=True)]
    if evaluation.sources:
        passes.append(reading.passes(tokens, whole=True))
    if evaluation.stages and config.tokens.decoupled:
        passes += [reading.passes(tokens, whole=True), reading.passes(tokens, whole=False)]
    if evaluation.stages and config.tokens.seed:
        passes.append(reading.passes(tokens, whole=False))
    if config.measures_start:
        texts = 2 if evaluation.sources else 1
        passes.append(reading.passes(texts * tokens, whole=reading.vectors_of_whole))
    if config.vectors_pool is not None:
        passes.append(reading.passes(tokens, whole=reading.vectors_of_whole))
    if apart_choice(config) != "never":
        passes.append(reading.passes(config.cluster_count * tokens, whole=False))
        if config.vectors_pool is not None:
            passes.append(reading.passes(ensemble_contexts(config, tokens), whole=reading.vectors_of_whole))
    return total([*passes, reading.starting(config.finetune_pool)])


def _estimate(reading: Reading) -> StageEstimate:
    return reading.divided("evaluate", reading.config.finetune_pool, _seconds(reading))


def _storage(files: Files) -> StageStorage:
    seed, parts = files.trained.get("seed"), files.trained.get("submodels")
    read = files.whole
    if seed is not None:
        read += seed.weights
    if parts is not None:
        read += parts.units * parts.weights
        read += files.whole if "finetune" in files.trained else 0  # the merged model
    return files.models("evaluate", read=read, stored=0)


def _works(streams: Streams) -> Iterator[Work]:
    config, pool = streams.config, streams.config.finetune_pool
    setting, tokens = "evaluation.max_tokens", config.evaluation.max_tokens
    yield Work("evaluate", pool, setting, tokens, lambda count: streams.evaluation(pool, count))
    for owned in config.pools.of_owners[:1]:  # all owners' seats have the same memory
        yield Work("evaluate by owners", owned, setting, tokens, functools.partial(streams.evaluation, owned))


COST = StageCost(_estimate, _storage, _works)
