"""What is asked of runs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue

from moedisco_ray.core.config import RunConfig, Tags
from service.schemas.base import DisplayName, Document, Dollars, Priority, example

MOST_EXPERTS = 65_536

_CONFIG: dict[str, Any] = {
    "name": "demo", "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 128}, "tokens": {"total": 1_600_000}}


def _plannable(raw: Any) -> Any:
    # The configuration's own rules try every number of clusters up to this one.
    model = raw.get("model") if isinstance(raw, dict) else None
    sizes = model.get("config") if isinstance(model, dict) else None
    experts = sizes.get("num_experts") if isinstance(sizes, dict) else None
    if isinstance(experts, str):
        try:
            experts = float(experts)
        except ValueError:
            return raw
    if isinstance(experts, int | float) and experts > MOST_EXPERTS:
        raise ValueError(f"model.config.num_experts is more than {MOST_EXPERTS}")
    return raw


PlannableConfig = Annotated[RunConfig, BeforeValidator(_plannable)]
"""A run's configuration with sizes that a request may ask to be thought about."""


class RunRequest(Document):
    """A run to make."""

    model_config = example(config=_CONFIG, priority=0, budget_dollars=20.0)

    config: PlannableConfig
    """The run's configuration, as `moedisco run` takes it. `output` is a directory under one of the service's roots."""
    priority: Priority = 0
    """Higher goes first."""
    budget_dollars: Dollars | None = None
    """The run is stopped, with a checkpoint, when its metered dollars reach this."""


class RunChange(Document):
    """What may change while a run exists; what is left out stays."""

    model_config = example(priority=10, budget_dollars=40.0)

    name: DisplayName | None = None
    tags: Tags | None = None
    priority: Priority | None = None
    budget_dollars: Dollars | None = None
    kept: bool | None = None
    """Whether retention leaves the run."""


class RetryRequest(Document):
    """A new run from an old one's configuration."""

    model_config = example(changes={"tokens.total": 1_000_000})

    changes: Annotated[dict[Annotated[str, Field(max_length=256)], JsonValue], Field(max_length=100)] = Field(default_factory=dict)
    """Dotted settings and their new values: {"tokens.total": 1000000}."""
    priority: Priority | None = None
    budget_dollars: Dollars | None = None


class CancelRequest(Document):
    """How to end a run."""

    model_config = example(force=False)

    force: bool = False
    """Kill its job at once instead of letting the step finish and a checkpoint be written."""


class EstimateRequest(Document):
    """A configuration to think about."""

    model_config = example(config=_CONFIG)

    config: PlannableConfig
