"""What we read of the dashboard's answers; they hold more."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import AliasPath, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from moedisco_ray.core.config.wording import plain_words
from service.domain.jobs import JobPhase
from service.errors import RayUnavailable


class DashboardAnswer(BaseModel):
    """Base: frozen; what it does not name is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Job(DashboardAnswer):
    """An element of `/api/jobs/`; drivers that were not submitted have no submission id."""

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
        """Whether it can carry work."""
        return self.state == "ALIVE"

    def lost_since(self, time: float) -> bool:
        """Whether it died after this moment, and not because it was asked to."""
        wanted = (self.state_message or "").startswith(("Expected", "Terminated due to idle"))
        return not self.alive and not wanted and (self.end_time_ms or 0) / 1000 > time


class Bundle(DashboardAnswer):
    """A worker's share of a placement group; without a node it waits."""

    node_id: str | None = None
    unit_resources: dict[str, float]


class Group(DashboardAnswer):
    """An element of `/api/v0/placement_groups`."""

    state: str
    bundles: list[Bundle] | None = None

    @property
    def waiting(self) -> list[Bundle]:
        """Bundles that no node carries yet."""
        if self.state not in ("PENDING", "RESCHEDULING"):
            return []
        return [bundle for bundle in self.bundles or () if not bundle.node_id]


class SummaryNode(DashboardAnswer):
    """A node in the summary; an autoscaler names its type."""

    type_name: str = Field("", validation_alias=AliasPath("raylet", "nodeTypeName"))


class Summary(DashboardAnswer):
    """`/nodes?view=summary`. Ray turns its keys into camel case, resource names too, but not what is inside a text."""

    nodes: list[SummaryNode] = Field(validation_alias=AliasPath("data", "summary"))
    uses: dict[str, str] = Field(validation_alias=AliasPath("data", "nodeLogicalResources"))
    """Per node, lines such as `1.0/2.0 low_mem_gpu`."""


class NodeList(DashboardAnswer):
    """`/api/v0/nodes`."""

    items: list[RayNode] = Field(validation_alias=AliasPath("data", "result", "result"))


class GroupList(DashboardAnswer):
    """`/api/v0/placement_groups`."""

    items: list[Group] = Field(validation_alias=AliasPath("data", "result", "result"))


class TrainWorker(DashboardAnswer):
    """A worker in `/api/train/v2/runs/v1`."""

    world_rank: int
    node_ip: str
    gpu_ids: list[int] = Field(default_factory=list)
    status: str | None = None


class TrainAttempt(DashboardAnswer):
    """A group of workers that Ray Train started for a training."""

    status: str
    status_detail: str | None = None
    start_time_ns: int
    end_time_ns: int | None = None
    workers: list[TrainWorker]


class SubmittedJob(DashboardAnswer):
    """The job whose driver started a training."""

    submission_id: str | None = None


class TrainRun(DashboardAnswer):
    """An element of `/api/train/v2/runs/v1`; its settings, which may hold secrets, are not read."""

    name: str
    status: str
    status_detail: str | None = None
    start_time_ns: int
    end_time_ns: int | None = None
    attempts: list[TrainAttempt]
    job_details: SubmittedJob | None = None


class TrainRunList(DashboardAnswer):
    """`/api/train/v2/runs/v1`."""

    train_runs: list[TrainRun]


T = TypeVar("T")


def read_as(form: type[T], answer: Any) -> T:
    """The answer in a form of this module.

    Raises:
        RayUnavailable: It has another: something else than this Ray answers there.
    """
    try:
        return TypeAdapter(form).validate_python(answer)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise RayUnavailable(f"Ray's answer cannot be read ({where} {plain_words(error.errors()[0])})") from error
