"""The parts of the Ray dashboard's responses that the service reads."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import AliasPath, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moedisco_ray.core.config.wording import plain_words
from service.domain.jobs import JobPhase
from service.errors import RayUnavailable


class DashboardAnswer(BaseModel):
    """Base of all responses: frozen; unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Job(DashboardAnswer):
    """An element of `/api/jobs/`; drivers that were not submitted as jobs have no submission id."""

    submission_id: str | None
    status: JobPhase
    message: str | None = None
    driver_exit_code: int | None = None


class RayNode(DashboardAnswer):
    """An element of `/api/v0/nodes`."""

    node_id: str
    node_ip: str
    state: str
    state_message: str | None = None
    resources_total: dict[str, float]
    labels: dict[str, str] = Field(default_factory=dict)
    end_time_ms: float | None = None

    @property
    def alive(self) -> bool:
        """Whether the node can run work."""
        return self.state == "ALIVE"

    def lost_since(self, time: float) -> bool:
        """Whether the node died unexpectedly after a time in seconds since the epoch."""
        expected = (self.state_message or "").startswith(("Expected", "Terminated due to idle"))
        return not self.alive and not expected and (self.end_time_ms or 0) / 1000 > time


class Bundle(DashboardAnswer):
    """The resources of one worker in a placement group; without a node, the bundle waits to be placed."""

    node_id: str | None = None
    unit_resources: dict[str, float]


class Group(DashboardAnswer):
    """An element of `/api/v0/placement_groups`."""

    state: str
    bundles: list[Bundle] | None = None

    @property
    def waiting(self) -> list[Bundle]:
        """Bundles that are not placed on a node yet."""
        if self.state not in ("PENDING", "RESCHEDULING"):
            return []
        return [bundle for bundle in self.bundles or () if not bundle.node_id]


class SummaryNode(DashboardAnswer):
    """A node in `/nodes?view=summary`; its type name is empty without an autoscaler."""

    type_name: str = Field("", validation_alias=AliasPath("raylet", "nodeTypeName"))


class Summary(DashboardAnswer):
    """`/nodes?view=summary`.

    Ray converts its keys, including resource names, to camel case, but not the text in values.
    """

    nodes: list[SummaryNode] = Field(validation_alias=AliasPath("data", "summary"))
    uses: dict[str, str] = Field(validation_alias=AliasPath("data", "nodeLogicalResources"))
    """Used and total amount of each resource, by node, as text lines such as `1.0/2.0 low_mem_gpu`."""


class NodeList(DashboardAnswer):
    """`/api/v0/nodes`."""

    items: list[RayNode] = Field(validation_alias=AliasPath("data", "result", "result"))


class GroupList(DashboardAnswer):
    """`/api/v0/placement_groups`."""

    items: list[Group] = Field(validation_alias=AliasPath("data", "result", "result"))


T = TypeVar("T")


def read_as(form: type[T], answer: Any) -> T:
    """Parse a response as one of this module's types.

    Raises:
        RayUnavailable: The response has another schema, so it does not come from a supported version of Ray.
    """
    try:
        return TypeAdapter(form).validate_python(answer)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise RayUnavailable(f"Ray's answer cannot be read ({where} {plain_words(error.errors()[0])})") from error
