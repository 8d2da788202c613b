"""Requests that create and change runs."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue

from moedisco_ray.core.config import MOST_TAGS, RunConfig, TagKey, TagValue
from service.domain.reuse import Reuse
from service.schemas.base import DisplayName, Document, Dollars, Note, Priority, ProjectReference, example

MOST_EXPERTS = 65_536
"""Maximum number of experts in a request: planning tries every number of clusters up to it."""

_CONFIG: dict[str, Any] = {
    "name": "demo",
    "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 128},
    "tokens": {"total": 1_600_000},
}


def _plannable(raw: Any) -> Any:
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
"""Configuration of a run, checked to have sizes that can be planned."""


class RunRequest(Document):
    """A run to create."""

    model_config = example(config=_CONFIG, priority=0, budget_dollars=20.0)

    config: PlannableConfig
    """Run configuration, as for `moedisco run`. `output` is a directory or URI under one of the service's output
    roots."""
    priority: Priority = 0
    """Priority in the queue; higher starts first."""
    budget_dollars: Dollars | None = None
    """Cost at which the run stops with a checkpoint (dollars)."""
    project: ProjectReference | None = None
    """Id or name of the project whose members may see the run; by default the caller's own."""


class RunChange(Document):
    """Changes to an existing run; omitted fields stay as they are."""

    model_config = example(priority=10, budget_dollars=40.0)

    name: DisplayName | None = None
    tags: Annotated[dict[TagKey, TagValue | None], Field(max_length=MOST_TAGS)] | None = None
    """Tags to set, by key; null removes one, and the others stay (a merge patch of RFC 7396)."""
    priority: Priority | None = None
    budget_dollars: Dollars | None = None
    """Cost at which the run stops with a checkpoint (dollars); null removes the budget."""
    kept: bool | None = None
    """Whether the run is exempt from retention."""
    note: Note | None = None
    """The owner's own note on the run; an empty text removes it."""
    project: ProjectReference | None = None
    """Id or name of another project to move the run to."""


class RetryRequest(Document):
    """A new run with the configuration of an existing one."""

    model_config = example(changes={"tokens.total": 1_000_000})

    changes: Annotated[dict[Annotated[str, Field(max_length=256)], JsonValue], Field(max_length=100)] = Field(
        default_factory=dict
    )
    """New values by dotted path of the setting, such as {"tokens.total": 1000000}."""
    priority: Priority | None = None
    budget_dollars: Dollars | None = None
    """Cost at which the run stops with a checkpoint (dollars): null means no budget, and if omitted, that of the
    existing run."""
    reuse: Reuse = "auto"
    """Runs whose finished stages the new run takes where it would make them alike: `auto` means the existing run and
    other finished runs that all who see it may see, `parent` the existing run alone, and `never` none."""


class CancelRequest(Document):
    """How to stop a run."""

    model_config = example(force=False)

    force: bool = False
    """End the driver within a minute, without a checkpoint."""


class EstimateRequest(Document):
    """A configuration to plan."""

    model_config = example(config=_CONFIG)

    config: PlannableConfig
