"""What a run's driver reports."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from service.schemas.base import Document, example


class DriverEvent(Document):
    """An event of a run's driver; see `moedisco_ray.core.events`."""

    type: Annotated[str, Field(max_length=32)]
    stage: Annotated[str, Field(max_length=32)] | None = None
    unit: Annotated[str, Field(max_length=64)] | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    time: Annotated[float, Field(ge=0, le=1e11)]


class Report(Document):
    """What a run's driver reports: consecutive lines of its `events.jsonl`."""

    model_config = example(
        first=0, events=[{"type": "run_started", "data": {"name": "demo"}, "time": 1_760_000_000.0}])

    first: Annotated[int, Field(ge=0, le=2**53)]
    """Number of the first line, from 0."""
    events: Annotated[list[DriverEvent], Field(max_length=5000)]


class ReportAnswer(Document):
    """What the service has."""

    next: int
    """The line it wants next: lines it has already are passed over, a gap is asked for again."""
