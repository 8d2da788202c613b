"""Cost of an arm's run at each measurement of its held-out loss, and the cost to reach a loss.

Every run has two accounts. The planned account is computed from operations, prices and the pools' speeds, and is the
same on every machine. It counts training as the plan does, and the forward passes over everything that the recipe reads
outside training: documents that a model vectorises for clustering; text for calibrating routers and comparing merges;
validation tokens for the final model, for earlier models (`evaluation.stages`), and for the model that finds a
document's cluster. It leaves out what only the comparison needs: measurements of the held-out loss during training, and
text of other sources. The metered account bills runs (`metering`): every second for which a worker was held, including
all of the above. Its dollars are those of the run's bill (`moedisco_ray.core.records.bill`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from benchmarks.study.compare.records import PhaseCost, Point
from moedisco_ray.core.config import Architecture, RunConfig
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.stages import STAGES
from moedisco_ray.plan import Parameters, Plan, count_parameters, submodel_architecture
from moedisco_ray.plan.cost import flops_per_token, training_cost

Axis = Literal["tokens", "dollars", "hours", "metered_dollars", "metered_hours"]
ReadingStage = Literal["cluster", "merge", "evaluate"]
Reader = Literal["whole", "whole_states", "submodel", "submodel_states"]
"""Model that reads a token: the whole MoE; a sub-model, or the seed, which has the same size; either of them without
its head, for hidden states only (`_states`)."""
Reads = Mapping[ReadingStage, Mapping[Reader, float]]
"""Tokens that a run reads outside its training, by stage and reader. A token counts once per pass; a pass through only
some of the layers counts as that share of a token."""
_ORDER = [stage.name for stage in STAGES]


def account(config: RunConfig, plan: Plan, reads: Reads) -> list[PhaseCost]:
    """All phases of a run, in order, with their planned cost.

    Args:
        config: Configuration of the run.
        plan: Plan of the run.
        reads: Tokens that the run reads outside its training.
    """
    trained = [
        PhaseCost(
            stage=stage.stage,
            pool=stage.pool,
            steps=stage.steps,
            tokens=stage.cost.tokens,
            flops=stage.cost.flops,
            hours=stage.cost.hours,
            dollars=stage.cost.dollars,
        )
        for stage in plan.stages
    ]
    return sorted([*trained, *overheads(config, plan, reads)], key=lambda phase: _ORDER.index(phase.stage))


def overheads(config: RunConfig, plan: Plan, reads: Reads) -> list[PhaseCost]:
    """Planned cost outside training.

    Clustering is on the low-memory pool, everything else on the pool that trains the whole MoE.
    """
    each = forward_flops(config, plan)
    at_once = next((stage.workers for stage in plan.stages if stage.stage == "submodels"), 1)
    experts = config.model.architecture.num_experts
    found = []
    for stage, tokens in reads.items():
        pool = config.pools.low_memory if stage == "cluster" else config.finetune_pool
        flops = sum(count * each[reader] for reader, count in tokens.items())
        # Counted as one token with all operations. The node type that reads in a mixed pool is unknown: assume the most
        # expensive.
        workers = at_once if stage == "cluster" else 1
        cost = max(
            (training_cost(flops, 1, kind, experts=experts, workers_per_unit=workers) for kind in pool.node_types),
            key=lambda cost: cost.dollars,
        )
        found.append(
            PhaseCost(
                stage=stage,
                pool=pool.name,
                steps=None,
                tokens=round(sum(tokens.values())),
                flops=flops,
                hours=cost.hours,
                dollars=cost.dollars,
            )
        )
    return found


def forward_flops(config: RunConfig, plan: Plan) -> dict[Reader, float]:
    """Operations to read one token (FLOPs): a third of training on it, as a backward pass costs twice a forward pass.

    The token is assumed to be the last of a full sequence: no other position costs more.
    """
    whole = config.model.architecture
    part = submodel_architecture(config.model.family_name, whole, config.cluster_count)

    def third(parameters: Parameters, shape: Architecture) -> float:
        return flops_per_token(parameters, shape, config.corpus.sequence_length, checkpointing=False) / 3

    def head(parameters: Parameters) -> float:
        return 2.0 * (parameters.head or parameters.embedding)

    submodel = count_parameters(config.model.family_name, part, plan.vocab_size)
    each = {"whole": third(plan.parameters, whole), "submodel": third(submodel, part)}
    return {
        "whole": each["whole"],
        "whole_states": each["whole"] - head(plan.parameters),
        "submodel": each["submodel"],
        "submodel_states": each["submodel"] - head(submodel),
    }


def curve(events: Iterable[Event], phases: Sequence[PhaseCost], config: RunConfig) -> list[Point]:
    """The run's measurements of its held-out loss, in order.

    If steps were repeated because a training went back to a checkpoint, the last measurement counts.

    Args:
        events: Events of the run, oldest first.
        phases: Phases of the run, from `account`.
        config: Configuration of the run, with the prices of its pools.
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
        points.append(
            Point(
                stage=event.stage,
                tokens=tokens,
                dollars=dollars_of(before) + part * phase.dollars,
                hours=hours_of(before) + part * phase.hours,
                metered_dollars=metered_dollars(meter, config),
                metered_hours=meter.wall_seconds / 3600,
                loss=float(event.data["held_out_loss"]),
            )
        )
    return points


def trained_tokens(phases: Iterable[PhaseCost]) -> int:
    """Tokens that are trained on, over all phases."""
    return sum(phase.tokens for phase in phases if phase.steps is not None)


def dollars_of(phases: Iterable[PhaseCost]) -> float:
    """Total dollars of the phases."""
    return sum(phase.dollars for phase in phases)


def hours_of(phases: Iterable[PhaseCost]) -> float:
    """Total hours of the phases, one after the other."""
    return sum(phase.hours for phase in phases)


def wall_hours(events: Iterable[Event]) -> float:
    """Total wall-clock time of a run's attempts (h)."""
    meter = Meter()
    for event in events:
        meter.update(event)
    return meter.wall_seconds / 3600


def metered_dollars(meter: Meter, config: RunConfig) -> float:
    """The total of the run's bill."""
    return metered_bill(meter, config).dollars or 0.0


def first_reach(points: Sequence[Point], loss: float, axis: Axis) -> float | None:
    """Point on an axis at which the whole model first reaches a loss, by linear interpolation between two measurements.

    Args:
        points: Measurements in order; those of the seed are skipped, because it is another model.
        loss: Loss to reach (nats per token).
        axis: Field of `Point` to return.

    Returns:
        Value on the axis; None if the loss is never reached.
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
