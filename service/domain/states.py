"""States of a run and the legal transitions between them.

queued ──► starting ──► running ──► succeeded
│ ▲         │           │ ├─────► failed
│ │         │           │ ▼
│ └─────────┴───────────┘ stopping ──► cancelled      (a run whose driver was lost is queued again)
└──────────────────────────────────────► cancelled; failed if this version refuses its configuration
failed, cancelled ──► queued                             (resume)
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class RunState(StrEnum):
    """State of a run."""

    QUEUED = "queued"
    STARTING = "starting"
    """Admitted; its Ray Job is being submitted or its driver has not reported yet."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to stop; the driver finishes its step and writes a checkpoint."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FOLLOWS: Mapping[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.STARTING, RunState.FAILED, RunState.CANCELLED}),
    RunState.STARTING: frozenset(
        {RunState.RUNNING, RunState.STOPPING, RunState.QUEUED, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}
    ),
    RunState.RUNNING: frozenset(
        {RunState.STOPPING, RunState.QUEUED, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}
    ),
    RunState.STOPPING: frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.CANCELLED: frozenset({RunState.QUEUED}),
}
"""Legal transitions; every state change of the service is checked against this table."""

ACTIVE = frozenset({RunState.STARTING, RunState.RUNNING, RunState.STOPPING})
"""States in which a run has, or may have, a driver."""

TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})


def may_follow(now: RunState, then: RunState) -> bool:
    """Whether a run may change from state `now` to state `then`."""
    return then in FOLLOWS[now]
