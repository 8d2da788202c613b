"""Event reports of drivers, and the metrics, logs and files of runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from service.schemas.base import Document, example


class DriverEvent(Document):
    """An event of a run's driver; see `moedisco_ray.core.records.events`."""

    type: Annotated[str, Field(max_length=32)]
    stage: Annotated[str, Field(max_length=32)] | None = None
    unit: Annotated[str, Field(max_length=64)] | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    time: Annotated[float, Field(ge=0, le=1e11)]


class Report(Document):
    """Consecutive lines of a driver's `events.jsonl`, sent to the service."""

    model_config = example(first=0, events=[{"type": "run_started", "data": {"name": "demo"}, "time": 1_760_000_000.0}])

    first: Annotated[int, Field(ge=0, le=2**53)]
    """Number of the first line in this report, counted from 0."""
    events: Annotated[list[DriverEvent], Field(max_length=5000)]
    begin: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Number of the driver's own first line. Lines from there on are new, even if an earlier driver has used their
    numbers."""
    secrets: bool = False
    """Whether the driver asks for the secrets that the run's configuration names."""


class ReportAnswer(Document):
    """Acknowledgement of a driver's report."""

    next: int
    """Number of the next line to send. The service ignores lines that it already has; lines after a gap must be sent
    again."""
    prices: dict[str, float] = Field(default_factory=dict)
    """The operator's present prices of the run's resources (dollars per worker-hour), by custom resource; absent if
    there are none. The driver charges them for slots that workers take from now on."""
    secrets: str | None = None
    """The secrets, sealed with the key of the attempt's driver; absent if it did not ask for them."""


class Series(Document):
    """One training metric, such as the loss, of one unit over its training."""

    unit: str
    stage: str
    step: list[int]
    tokens: list[int]
    value: list[float]
    points: int
    """Number of points before downsampling."""


class Metrics(Document):
    """Training curves of one metric, such as the loss."""

    figure: str
    series: list[Series]


Figure = Literal["held_out_loss", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "largest_load", "dead_experts"]


class LogFile(Document):
    """A log of a run."""

    name: str
    """`driver`, or a worker such as `submodel-0.0` (unit and rank)."""
    bytes: int
    updated: float


class LogPage(Document):
    """Logs of a run, the driver's log first."""

    items: list[LogFile]


class Artifact(Document):
    """A file of the run directory."""

    path: str
    bytes: int
    updated: float


class ArtifactPage(Document):
    """Files of the run directory, by path."""

    items: list[Artifact]
