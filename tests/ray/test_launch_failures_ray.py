"""The way of a cloud's refusal from the autoscaler's process to a run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray

from moedisco_ray.execution.ray.autoscaling import launch_failures

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]

PUBLISH = """
import json, sys
from moedisco_ray.execution.ray.autoscaling import launch_failures
launch_failures.publish(json.loads(sys.argv[1]))
"""


def publish(messages: str) -> None:
    """Publish from a process that is no driver."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "disabled"}
    subprocess.run([sys.executable, "-c", PUBLISH, messages], env=environment, check=True, timeout=60)


def test_a_driver_reads_what_the_autoscalers_process_publishes() -> None:
    assert launch_failures.published() == {}
    publish('{"low-t4-spot": "no role"}')
    assert launch_failures.published() == {"low-t4-spot": "no role"}
    publish("{}")
    assert launch_failures.published() == {}
