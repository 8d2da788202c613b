"""Why a cloud does not start nodes: missing capacity, a quota, or a mistake that someone must correct.

The autoscaler's process on the head publishes the failures that waiting does not cure. Runs that wait for nodes warn
about them.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Literal

import ray

from moedisco_ray.execution.clouds import CLOUDS
from moedisco_ray.execution.ray import ray_internals

_NAMESPACE = "moedisco"
_KEY = "launch_failures"
_VALID_SECONDS = 300.0
"""Seconds after which a published failure no longer counts. While the nodes are needed, the autoscaler requests them
again much sooner, and a failure that persists is published again."""
_MAX_LENGTH = 400
"""Maximum length of an error's text; some clouds append pages of details."""

Kind = Literal["capacity", "quota", "other"]


def kind_of(error: str) -> Kind:
    """Classify a cloud's error by its text, in which clouds name their error codes.

    Only missing capacity passes with time, so only it justifies a more expensive node type. A quota lasts until someone
    raises it, and there is often another quota for on-demand machines: falling back to these would be permanent.
    """
    words = set(re.findall(r"\w+", error))
    if any(words & cloud.capacity for cloud in CLOUDS.values()):
        return "capacity"
    says_quota = "quota" in error.lower()
    if any(words & cloud.quota or (says_quota and words & cloud.said_quota) for cloud in CLOUDS.values()):
        return "quota"
    return "other"


def message(node_type: str, error: str) -> str:
    """A sentence for the user about a failure that waiting does not cure."""
    remedy = {
        "quota": f"request a higher quota, or lower max_workers of {node_type} in the cluster file",
        "other": "correct the account or the cluster file",
    }[kind_of(error)]
    text = " ".join(error.split())
    shown = text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."
    return f"the cloud refuses to start {node_type} ({shown}): {remedy}; the autoscaler keeps trying"


def publish(messages: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
    """Publish the current launch failures to all runs; called in the autoscaler's process.

    Without a Ray cluster, do nothing.

    Args:
        messages: The sentence that describes the failure, for each node type that fails to start.
        clock: Returns the current time, in seconds since the epoch.
    """
    now = clock()
    with contextlib.suppress(ConnectionError, ray.exceptions.RpcError):  # the autoscaler's log has these failures too
        ray_internals.kv_put_from_head(
            _KEY, json.dumps({name: [now, text] for name, text in messages.items()}), _NAMESPACE
        )


def published(clock: Callable[[], float] = time.time) -> dict[str, str]:
    """For each node type that the cloud refuses to start at present, a sentence that says why."""
    kept = ray_internals.kv_get(_KEY, _NAMESPACE) if ray.is_initialized() else None
    now = clock()
    return (
        {}
        if kept is None
        else {name: text for name, (at, text) in json.loads(kept).items() if now - at < _VALID_SECONDS}
    )
