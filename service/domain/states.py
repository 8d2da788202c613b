"""A run's states, and which may follow which.

queued ──► starting ──► running ──► succeeded
│ ▲         │           │ ├─────► failed
│ │         │           │ ▼
│ └─────────┴───────────┘ stopping ──► cancelled      (a lost driver is queued again)
└──────────────────────────────────────► cancelled; failed where this version refuses its configuration
failed, cancelled ──► queued                             (resume)
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class RunState(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    STARTING = "starting"
    """Admitted: its Ray Job is being submitted, or its driver has not spoken yet."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to end: the current step is finished and a checkpoint written."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FOLLOWS: Mapping[RunState, frozenset[RunState]] = {
    RunState.QUEUED: frozenset({RunState.STARTING, RunState.FAILED, RunState.CANCELLED}),
    RunState.STARTING: frozenset({
        RunState.RUNNING, RunState.STOPPING, RunState.QUEUED, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}),
    RunState.RUNNING: frozenset({
        RunState.STOPPING, RunState.QUEUED, RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}),
    RunState.STOPPING: frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}),
    RunState.SUCCEEDED: frozenset(),
    RunState.FAILED: frozenset({RunState.QUEUED}),
    RunState.CANCELLED: frozenset({RunState.QUEUED}),
}
"""The table of legal transitions; every state change of the service goes through it."""

ACTIVE = frozenset({RunState.STARTING, RunState.RUNNING, RunState.STOPPING})
"""States in which a run has, or may have, a driver."""

TERMINAL = frozenset({RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED})


def may_follow(now: RunState, then: RunState) -> bool:
    """Whether a run may go from one state to the other."""
    return then in FOLLOWS[now]
