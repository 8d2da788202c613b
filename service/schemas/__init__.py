"""Request and response bodies of the REST API, shared by server and client. Times are seconds since the epoch (UTC)."""

from service.schemas.access import (
    AuditEntry,
    AuditPage,
    Identity,
    NewSignInCode,
    NewToken,
    SessionInfo,
    SessionPage,
    SessionRequest,
    TokenInfo,
    TokenPage,
    TokenRequest,
)
from service.schemas.base import DisplayName, Document, Dollars, Health, Mistake, Priority, Problem, Scope
from service.schemas.planning import Estimate, PoolList, PoolNode, PoolStatus, Quota, Share
from service.schemas.requests import (
    MOST_EXPERTS,
    CancelRequest,
    EstimateRequest,
    PlannableConfig,
    RetryRequest,
    RunChange,
    RunRequest,
)
from service.schemas.runs import (
    Money,
    Run,
    RunDetail,
    RunPage,
    StageProgress,
    Unit,
    UnitPage,
)
from service.schemas.watching import (
    Artifact,
    ArtifactPage,
    DriverEvent,
    Figure,
    LogFile,
    LogPage,
    Metrics,
    Report,
    ReportAnswer,
    Series,
)

__all__ = [
    "MOST_EXPERTS", "Artifact", "ArtifactPage", "AuditEntry", "AuditPage", "CancelRequest", "DisplayName",
    "Document", "Dollars", "DriverEvent", "Estimate", "EstimateRequest", "Figure", "Health", "Identity", "LogFile",
    "LogPage", "Metrics", "Mistake", "Money", "NewSignInCode", "NewToken", "PlannableConfig", "PoolList",
    "PoolNode", "PoolStatus", "Priority", "Problem", "Quota", "Report", "ReportAnswer", "RetryRequest", "Run",
    "RunChange", "RunDetail", "RunPage", "RunRequest", "Scope", "Series", "SessionInfo", "SessionPage",
    "SessionRequest", "Share", "StageProgress", "TokenInfo", "TokenPage", "TokenRequest", "Unit", "UnitPage",
]
