"""All private API of Ray Data that the package uses, checked with the Ray version `ray_internals.CHECKED_WITH`."""

from __future__ import annotations

import os

import ray

# Ray Data starts one of each per Ray cluster, and has no option for how they are shown.
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.data._internal.stats import _StatsActor

__all__ = ["hide_bookkeeping"]


def hide_bookkeeping() -> None:
    """Keep Ray Data's calls of its own actors out of Ray's list of tasks, where they are most of a run's entries.

    The actor that counts the uses of Ray Data for its authors is not started; a user may ask for it.
    """
    os.environ.setdefault("RAY_DATA_USAGE_DISABLED", "1")
    _StatsActor._default_options["enable_task_events"] = False  # noqa: SLF001 - the actor is decorated already
    for method in vars(_AutoscalingCoordinatorActor).values():
        if callable(method):
            ray.method(enable_task_events=False)(method)
