"""What a run has left behind: its figures, logs and files."""

from __future__ import annotations

from typing import Literal

from service.schemas.base import Document


class Series(Document):
    """One figure of one unit over its training."""

    unit: str
    stage: str
    step: list[int]
    tokens: list[int]
    value: list[float]
    points: int
    """How many there are before down-sampling."""


class Metrics(Document):
    """Curves."""

    figure: str
    series: list[Series]


Figure = Literal["loss", "lr", "grad_norm", "tokens_per_second"]


class LogFile(Document):
    """A log that can be read and followed."""

    name: str
    """`driver`, or a worker such as `submodel-0.0` (unit and rank)."""
    bytes: int
    updated: float


class LogPage(Document):
    """Logs of a run, the driver's first."""

    items: list[LogFile]


class Artifact(Document):
    """A file of the run directory."""

    path: str
    bytes: int
    updated: float


class ArtifactPage(Document):
    """Files of the run directory, by path."""

    items: list[Artifact]
