"""The series that experiment trackers show: numbers of a run's events and of its report, and the run's settings.

A series belongs to a unit, such as `submodel-0`, or to the whole run (unit ""). The x-axis of a unit's series is the
number of tokens that the unit was trained on. The x-axis of the run's series is the number of tokens that all units
were trained on; only the bill's is seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import Bill
from moedisco_ray.core.records.events import BILL_FIGURES, Event
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import (
    ClusterFigures,
    EvaluationRecord,
    Figures,
    SourceFigures,
    StartFigures,
    UnseenFigures,
)
from moedisco_ray.core.stages import OF_CLUSTERS, TrainingStage, stage_named

RUN = ""
"""The unit of series that belong to the whole run."""

_EVENTS = {
    "progress": ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "largest_load", "dead_experts"),
    "evaluation": ("held_out_loss",),
}


class Points(NamedTuple):
    """Values of several series of a unit at one position of their x-axis."""

    unit: str
    values: dict[str, float]
    position: int
    axis: str = "tokens"


def unit_points(event: Event) -> Points | None:
    """The numbers of a unit in an event; None if the event has none."""
    if event.unit is None or event.type not in _EVENTS:
        return None
    values = finite({name: event.data.get(name) for name in _EVENTS[event.type]})
    return Points(event.unit, values, int(event.data.get("tokens", 0))) if values else None


def bill_points(bill: Bill) -> Points:
    """The totals of a bill: those so far while the run is active, and the final ones after it has ended."""
    return Points(
        RUN, finite({f"bill/{name}": getattr(bill, name) for name in BILL_FIGURES}), int(bill.seconds or 0), "seconds"
    )


def report_points(report: RunReport) -> Iterator[Points]:
    """Yield the figures of a finished run: perplexities, expert balance, accuracies, speed and cost of the stages."""
    measured, trained = report.evaluation, 0
    if measured.start is not None:
        yield Points(
            RUN,
            finite(
                {
                    **_perplexities(measured.start, measured.start.sources),
                    **_clusters(measured.start.clusters),
                    **({} if measured.unseen is None else _unseen(measured.unseen.start)),
                }
            ),
            0,
        )
    for stage in report.stages:
        trained += stage.tokens or 0
        whole, kind = measured.stages.get(stage.name), stage_named(stage.name)
        # Sub-models follow below, and the figures of the finished model are those of the run.
        if whole is not None and not (isinstance(kind, TrainingStage) and (kind.per_cluster or kind.trains_whole)):
            yield Points(RUN, _perplexities(whole), trained)
    for number, figures in enumerate(
        unit for name in OF_CLUSTERS & measured.stages.keys() for unit in measured.stages[name].units
    ):
        unit = f"submodel-{number}"
        if figures.perplexity is not None:
            yield Points(
                unit,
                {"perplexity": figures.perplexity},
                max(report.curves[unit].tokens) if unit in report.curves else 0,
            )
    yield Points(
        RUN, finite({**_perplexities(measured, measured.sources), **_parts(measured), **_stages(report)}), trained
    )


def _parts(measured: EvaluationRecord) -> dict[str, float | None]:
    """The finished model by cluster, data owner, unseen source, lm-eval task and router."""
    values = _clusters(measured.clusters)
    values |= {f"perplexity/owner/{owner}": each.perplexity for owner, each in measured.owners.items()}
    values |= _unseen(measured.unseen)
    values |= {f"accuracy/{each.task}": each.acc for each in measured.lm_eval}
    if measured.routers:
        values["experts/dead"] = sum(router.dead for router in measured.routers)
    for router in measured.routers:
        values[f"experts/dead/layer-{router.layer}"] = router.dead
        values[f"experts/largest_load/layer-{router.layer}"] = max(router.load) * len(router.load)
    return values


def _stages(report: RunReport) -> dict[str, float | None]:
    """Cost and speed of each stage."""
    return {
        f"stages/{stage.name}/{name}": getattr(stage, name)
        for stage in report.stages
        for name in ("dollars", "seconds", "loss", "mfu", "tokens_per_second_per_worker")
    }


def _clusters(clusters: Iterable[ClusterFigures]) -> dict[str, float | None]:
    return {f"perplexity/cluster/{each.cluster}": each.perplexity for each in clusters}


def _unseen(figures: UnseenFigures | StartFigures | None) -> dict[str, float | None]:
    return (
        {}
        if figures is None
        else {
            "perplexity/unseen": figures.perplexity,
            **{f"perplexity/unseen/{each.source}": each.perplexity for each in figures.sources},
        }
    )


def _perplexities(figures: Figures, sources: Iterable[SourceFigures] = ()) -> dict[str, float]:
    return finite(
        {
            "perplexity/all": figures.perplexity,
            "bits_per_byte/all": figures.bits_per_byte,
            **{f"perplexity/source/{each.source}": each.perplexity for each in sources},
        }
    )


def finite(values: Mapping[str, float | None]) -> dict[str, float]:
    """The numbers that are finite, under names that every tracker takes."""
    return {plain(name): float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def plain(name: str) -> str:
    """A name in the letters that every tracker takes; runs of other letters become one underscore."""
    return "/".join(re.sub(r"[^\w.-]+", "_", part) for part in name.split("/") if part.strip("."))


def parameters(config: RunConfig) -> dict[str, str]:
    """The configuration as flat `section.setting` pairs."""
    return dict(_flatten(config.model_dump(mode="json"), ""))


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield plain(path), str(value)
        return
    for key, child in value.items():
        yield from _flatten(child, f"{path}.{key}" if path else str(key))
