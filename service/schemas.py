"""What travels over REST; the server answers with these and the client reads them. Times are seconds since the epoch, UTC."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from moedisco_ray.config import RunConfig
from service.domain.states import RunState

DisplayName = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
Tags = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=256)]], Field(max_length=32)]
Priority = Annotated[int, Field(ge=-100, le=100)]
Dollars = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scope = Literal["read", "submit", "admin"]
"""Each holds those before it. `admin` sees every owner's runs, tokens, prices and the audit log."""


MOST_EXPERTS = 65_536

_CONFIG: dict[str, Any] = {
    "name": "demo", "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 128}, "tokens": {"total": 1_600_000}}


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [values]})


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


class Document(BaseModel):
    """Base: frozen, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunRequest(Document):
    """A run to make."""

    model_config = _example(config=_CONFIG, priority=0, budget_dollars=20.0)

    config: PlannableConfig
    """The run's configuration, as `moedisco run` takes it. `output` is a directory under one of the service's roots."""
    priority: Priority = 0
    """Higher goes first."""
    budget_dollars: Dollars | None = None
    """The run is stopped, with a checkpoint, when its metered dollars reach this."""


class RunChange(Document):
    """What may change while a run exists; what is left out stays."""

    model_config = _example(priority=10, budget_dollars=40.0)

    name: DisplayName | None = None
    tags: Tags | None = None
    priority: Priority | None = None
    budget_dollars: Dollars | None = None


class RetryRequest(Document):
    """A new run from an old one's configuration."""

    model_config = _example(changes={"tokens.total": 1_000_000})

    changes: Annotated[dict[str, JsonValue], Field(max_length=100)] = Field(default_factory=dict)
    """Dotted settings and their new values: {"tokens.total": 1000000}."""
    priority: Priority | None = None
    budget_dollars: Dollars | None = None


class CancelRequest(Document):
    """How to end a run."""

    model_config = _example(force=False)

    force: bool = False
    """Kill its job at once instead of letting the step finish and a checkpoint be written."""


class Money(Document):
    """What a run costs."""

    dollars: float
    """Metered so far, every attempt included."""
    worker_seconds: dict[str, float]
    """Per pool."""
    estimate_dollars: float
    """What the plan said."""
    full_training_dollars: float
    """The plan's cost of training the whole model on as many tokens on the high-memory pool."""
    budget_dollars: float | None


class StageProgress(Document):
    """One stage of the pipeline."""

    name: str
    status: Literal["waiting", "running", "done", "reused", "failed"]
    started: float | None
    seconds: float | None


class Run(Document):
    """A run as it stands."""

    id: str
    name: str
    owner: str
    tags: dict[str, str]
    priority: int
    state: RunState
    reason: str | None
    """Why it is in this state: what it waits for, why it failed."""
    position: int | None
    """Place in the queue, from 1; null once it is out of it."""
    attempt: int
    """Drivers started so far."""
    parent: str | None
    """The run it is a retry of."""
    created: float
    queued: float
    started: float | None
    ended: float | None
    updated: float
    stages: list[StageProgress]
    money: Money
    events: int
    """Length of its event stream so far."""
    job_url: str | None
    """Its job in the Ray dashboard."""


class RunDetail(Run):
    """A run with its configuration."""

    config: dict[str, Any]


class RunPage(Document):
    """Runs, newest first."""

    items: list[Run]
    next_cursor: str | None
    """Ask with `cursor` of this for what follows; null: that was all."""


class Unit(Document):
    """A part of a stage with its own progress: the seed, a sub-model, the fine-tune."""

    unit: str
    stage: str
    status: Literal["running", "restarting", "done"]
    step: int
    steps: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    restarts: int
    workers: int
    node: str | None
    started: float | None
    ended: float | None


class UnitPage(Document):
    """Parts of a run that train by themselves, in the order in which they started."""

    items: list[Unit]


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


class EstimateRequest(Document):
    """A configuration to think about."""

    model_config = _example(config=_CONFIG)

    config: PlannableConfig


class PoolNode(Document):
    """A Ray node."""

    id: str
    address: str
    alive: bool
    resources: dict[str, float]
    labels: dict[str, str]


class PoolStatus(Document):
    """Machines that carry one tag."""

    resource: str
    slots: float
    """Workers there is room for."""
    free: float
    gpus: float
    nodes: list[PoolNode]
    price_per_hour: float | None
    """From the price book; null: each run's configuration says."""
    lost: int
    """Nodes of this pool that died in the last 24 hours."""
    pending: int
    """Workers that the autoscaler was asked for and has not brought yet."""


class Pools(Document):
    """Every pool of the cluster."""

    connected: bool
    """Whether Ray answers."""
    items: list[PoolStatus]


class PriceEntry(Document):
    """An entry of the price book."""

    model_config = _example(resource="low_mem_gpu", dollars_per_hour=0.35, since=1_760_000_000.0)

    resource: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.-]{0,63}$")]
    dollars_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    since: Annotated[float, Field(ge=0, le=1e11, allow_inf_nan=False)] | None = None
    """From when; null: now."""


class PriceBook(Document):
    """All entries, oldest first."""

    items: list[PriceEntry]


class TokenRequest(Document):
    """A token to make."""

    model_config = _example(name="ci", owner="ann", scopes=["submit"], expires_in_days=90)

    name: DisplayName
    owner: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.@-]{0,63}$")]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=3)]
    expires_in_days: Annotated[float, Field(gt=0, le=3650)] | None = 90


class TokenInfo(Document):
    """A token, without itself."""

    id: str
    name: str
    owner: str
    scopes: list[Scope]
    created: float
    expires: float | None
    revoked: float | None
    used: float | None


class NewToken(TokenInfo):
    """A token, shown this once."""

    token: str


class TokenPage(Document):
    """Tokens, oldest first."""

    items: list[TokenInfo]


class SessionRequest(Document):
    """A token that a browser turns into a cookie."""

    model_config = _example(token="mdk_...")  # noqa: S106 - none

    token: Annotated[str, Field(max_length=256)]


class Identity(Document):
    """Who asks."""

    owner: str
    scopes: list[Scope]
    version: str
    """Of the service."""
    dashboard_url: str | None
    """Of Ray."""


class WebhookRequest(Document):
    """Somebody to tell of state changes."""

    model_config = _example(url="https://example.org/moedisco", states=["succeeded", "failed"])

    url: Annotated[str, Field(max_length=2048, pattern=r"^https?://")]
    states: Annotated[list[RunState], Field(max_length=7)] = Field(default_factory=list)
    """Empty: all."""


class WebhookInfo(Document):
    """A webhook."""

    id: str
    url: str
    states: list[RunState]
    created: float


class NewWebhook(WebhookInfo):
    """A webhook with the secret its deliveries are signed with, shown this once."""

    secret: str


class WebhookPage(Document):
    """Webhooks, oldest first."""

    items: list[WebhookInfo]


class DeliveryInfo(Document):
    """One message to a webhook."""

    id: str
    run_id: str
    created: float
    attempts: int
    due: float | None
    delivered: float | None
    answer: str | None


class DeliveryPage(Document):
    """Deliveries, newest first, at most 100."""

    items: list[DeliveryInfo]


class AuditEntry(Document):
    """Who did what."""

    id: str
    time: float
    owner: str
    action: str
    target: str
    detail: dict[str, Any]
    address: str | None


class AuditPage(Document):
    """Audit log, newest first."""

    items: list[AuditEntry]
    next_cursor: str | None


class DriverEvent(Document):
    """An event of a run's driver; see `moedisco_ray.events`."""

    type: Annotated[str, Field(max_length=32)]
    stage: Annotated[str, Field(max_length=32)] | None = None
    unit: Annotated[str, Field(max_length=64)] | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    time: Annotated[float, Field(ge=0, le=1e11)]


class Report(Document):
    """What a run's driver reports: consecutive lines of its `events.jsonl`."""

    model_config = _example(
        first=0, events=[{"type": "run_started", "data": {"name": "demo"}, "time": 1_760_000_000.0}])

    first: Annotated[int, Field(ge=0, le=2**53)]
    """Number of the first line, from 0."""
    events: Annotated[list[DriverEvent], Field(max_length=5000)]


class ReportAnswer(Document):
    """What the service has."""

    next: int
    """The line it wants next: lines it has already are passed over, a gap is asked for again."""


class Health(Document):
    """Whether the service lives, or can work."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]
    """Each part and `ok`, or what is wrong with it."""


class Mistake(Document):
    """One mistake in a request."""

    field: str
    """Dotted path: `config.clusters.count`."""
    message: str


class Problem(Document):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[Mistake] = Field(default_factory=list)
