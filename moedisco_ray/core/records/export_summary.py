"""The record of the export stage: the model that it has written."""

from __future__ import annotations

from pydantic import Field

from moedisco_ray.core.records.summaries import Record


class Sample(Record):
    """A text that the finished model wrote."""

    prompt: str
    text: str


class ModelFacts(Record):
    """What the model card says about the origin of the model."""

    base_model: str | None = None
    """Name at the Hugging Face hub of the model that training started from; null: none is known."""
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: list[str] = Field(default_factory=list)
    """Languages in the model card of the model that the run starts from."""
    datasets: list[str] = Field(default_factory=list)
    """Data sets of the hub that the run trained on."""


class ExportSummary(Record):
    """Summary of the export stage."""

    parameters: int
    active_parameters: int
    """Number of parameters that take part in computing one token."""
    submodels: int | None = None
    """Number of sub-models if the directory holds an ensemble; null if it holds one model."""
    rounded_to: str | None = None
    """Dtype that the trained weights were rounded to; null if they were stored exactly."""
    bytes: int = 0
    """Size of the weights in bytes."""
    adapter: bool = False
    """Whether the adapters of the fine-tune are in a folder of their own too."""
    facts: ModelFacts = ModelFacts()
    """Base model, licence, languages and data sets, for the model card."""
    samples: list[Sample] = Field(default_factory=list)
