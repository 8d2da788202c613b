"""What an arm's run has cost at each look at its held-out loss, and what a loss costs.

Two accounts are kept of every run. The planned one is arithmetic on operations, prices and the pools' speeds, the same on every
machine. It counts training as the plan does, and what the recipe has to read outside it, in operations of forward passes: the
documents that a model vectorises so that they can be clustered; the text that routers are calibrated and merges compared on; the
validation tokens that the arm's own final model is measured on and, by `evaluation.stages`, those before it, with the model that
finds a document's cluster. It leaves out what only the comparison needs: evaluations of the held-out loss during training, and text
of other sources. The metered one is the fold that bills runs (`metering`): every second for which a worker was
held, all of these included; its dollars are those of the run's bill (`moedisco_ray.core.bill`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from moedisco_ray.core.bill import metered_bill
from moedisco_ray.core.config import Architecture, PoolName, RunConfig
from moedisco_ray.core.events import Event
from moedisco_ray.core.metering import Meter
from moedisco_ray.core.stages import STAGES
from moedisco_ray.plan import Parameters, Plan, count_parameters, submodel_architecture
from moedisco_ray.plan.cost import flops_per_token, training_cost

Axis = Literal["tokens", "dollars", "hours", "metered_dollars", "metered_hours"]
ReadingStage = Literal["cluster", "merge", "evaluate"]
Reader = Literal["whole", "whole_states", "submodel", "submodel_states", "bigrams"]
"""Who reads a token: the whole MoE; a sub-model, or the seed, which is as large; either for its hidden states alone, so that there
is nothing for the head to do; one cluster's bigrams (`clusters.method`)."""
Reads = Mapping[ReadingStage, Mapping[Reader, float]]
"""What a run reads outside its training: tokens, each as often as it is read. A pass that ends after some of the layers is that
share of a token."""
BIGRAM_FLOPS = 20.0
"""More than the sums, quotients and logarithm that a token's likelihood in one cluster takes, with its counting."""
_ORDER = [stage.name for stage in STAGES]


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """What one phase of a run takes, as planned.

    Attributes:
        stage: Its name in the pipeline.
        pool: Where.
        steps: Of one model; None where nothing is trained.
        tokens: Of all its models together: trained on, or read (`Reads`).
        flops: Operations.
        hours: Wall-clock. Documents are vectorised by as many workers as train sub-models at once; all else is read by one.
        dollars: At the pool's price.
    """

    stage: str
    pool: PoolName
    steps: int | None
    tokens: int
    flops: float
    hours: float
    dollars: float


@dataclasses.dataclass(frozen=True)
class Point:
    """One look at the held-out loss.

    Attributes:
        stage: Which model was looked at: `seed` or `finetune`.
        tokens: Trained on so far, by all models of the run.
        dollars: Planned, of those tokens and of what was read before this model's training began.
        hours: Planned, wall-clock, of the same.
        metered_dollars: What the workers held so far cost.
        metered_hours: Wall-clock, without the time between an attempt's end and the next one's start.
        loss: Nats per token.
    """

    stage: str
    tokens: int
    dollars: float
    hours: float
    metered_dollars: float
    metered_hours: float
    loss: float


def account(config: RunConfig, plan: Plan, reads: Reads) -> list[PhaseCost]:
    """Everything that a run pays for, in its order.

    Args:
        config: The run's.
        plan: Of the same.
        reads: What it reads outside its training.
    """
    trained = [
        PhaseCost(
            stage.stage, stage.pool, stage.steps, stage.cost.tokens, stage.cost.flops, stage.cost.hours, stage.cost.dollars)
        for stage in plan.stages]
    return sorted([*trained, *overheads(config, plan, reads)], key=lambda phase: _ORDER.index(phase.stage))


def overheads(config: RunConfig, plan: Plan, reads: Reads) -> list[PhaseCost]:
    """What a run pays for outside its training: clustering on the low-memory pool, the rest where its whole MoE is trained."""
    each = forward_flops(config, plan)
    at_once = next((stage.workers for stage in plan.stages if stage.stage == "submodels"), 1)
    found = []
    for stage, tokens in reads.items():
        pool = config.pools.low_memory if stage == "cluster" else config.finetune_pool
        flops = sum(count * each[reader] for reader, count in tokens.items())
        # As one token of so many operations. Which type of a mixed pool reads is not known: the dearest.
        workers = at_once if stage == "cluster" else 1
        cost = max(
            (training_cost(flops, 1, kind, workers_per_unit=workers) for kind in pool.node_types), key=lambda cost: cost.dollars)
        found.append(PhaseCost(stage, pool.name, None, round(sum(tokens.values())), flops, cost.hours, cost.dollars))
    return found


def forward_flops(config: RunConfig, plan: Plan) -> dict[Reader, float]:
    """Operations to read one token: a third of a model's training step, because gradients take twice the forward pass.

    The token is assumed to be the last of a full sequence: no other position costs more.
    """
    whole = config.model.architecture
    part = submodel_architecture(whole, config.clusters.count)

    def third(parameters: Parameters, shape: Architecture) -> float:
        return flops_per_token(parameters, shape, config.corpus.sequence_length, checkpointing=False) / 3

    def head(parameters: Parameters) -> float:
        return 2.0 * (parameters.head or parameters.embedding)

    submodel = count_parameters(config.model.family, part, plan.vocab_size)
    each = {"whole": third(plan.parameters, whole), "submodel": third(submodel, part)}
    return {
        "whole": each["whole"], "whole_states": each["whole"] - head(plan.parameters),
        "submodel": each["submodel"], "submodel_states": each["submodel"] - head(submodel),
        "bigrams": BIGRAM_FLOPS}


def curve(events: Iterable[Event], phases: Sequence[PhaseCost], config: RunConfig) -> list[Point]:
    """The run's looks at its held-out loss, in order.

    Of steps that were made twice, because a training went back to a checkpoint, the last look counts.

    Args:
        events: The run's, oldest first.
        phases: What it pays for, as `account` says.
        config: The run's: its pools' prices.
    """
    meter = Meter()
    points: list[Point] = []
    for event in events:
        meter.update(event)
        if event.type != "evaluation" or event.stage is None:
            continue
        before = _before(phases, event.stage)
        phase = phases[len(before)]
        part = event.data["tokens"] / phase.tokens
        tokens = trained_tokens(before) + event.data["tokens"]
        while points and points[-1].tokens >= tokens:
            points.pop()
        points.append(Point(
            event.stage, tokens,
            dollars=dollars_of(before) + part * phase.dollars,
            hours=hours_of(before) + part * phase.hours,
            metered_dollars=metered_dollars(meter, config), metered_hours=meter.wall_seconds / 3600,
            loss=float(event.data["held_out_loss"])))
    return points


def trained_tokens(phases: Iterable[PhaseCost]) -> int:
    """Those that are trained on."""
    return sum(phase.tokens for phase in phases if phase.steps is not None)


def dollars_of(phases: Iterable[PhaseCost]) -> float:
    """Of all of them."""
    return sum(phase.dollars for phase in phases)


def hours_of(phases: Iterable[PhaseCost]) -> float:
    """Of all of them, one after the other."""
    return sum(phase.hours for phase in phases)


def wall_hours(events: Iterable[Event]) -> float:
    """Wall-clock time of a run's attempts together."""
    meter = Meter()
    for event in events:
        meter.update(event)
    return meter.wall_seconds / 3600


def metered_dollars(meter: Meter, config: RunConfig) -> float:
    """The total of the run's bill."""
    return metered_bill(meter, config).dollars or 0.0


def first_reach(points: Sequence[Point], loss: float, axis: Axis) -> float | None:
    """Where the curve of the whole model first comes down to a loss, between two looks by linear interpolation.

    Args:
        points: In order; the seed's are passed over, for it is another model.
        loss: To reach.
        axis: What is asked for.

    Returns:
        None where the loss is never reached.
    """
    own = [point for point in points if point.stage == "finetune"]
    if own and own[0].loss <= loss:
        return float(getattr(own[0], axis))
    for left, right in itertools.pairwise(own):
        if right.loss <= loss:
            at = (left.loss - loss) / (left.loss - right.loss)
            start, end = getattr(left, axis), getattr(right, axis)
            return float(start + at * (end - start))
    return None


def _before(phases: Sequence[PhaseCost], stage: str) -> list[PhaseCost]:
    return list(itertools.takewhile(lambda phase: phase.stage != stage, phases))
