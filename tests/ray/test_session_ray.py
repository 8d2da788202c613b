"""What Ray's own helpers find on a cluster that has no dashboard."""

from __future__ import annotations

import sys
import time

import pytest
import ray
from ray import cloudpickle
from ray.train.v2._internal.state.util import is_actor_alive
from ray.util.state.exception import RayStateApiException

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(120)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it


def ask() -> tuple[bool, float]:
    """Whether Ray reported that no dashboard answers, and after how many seconds."""
    began = time.monotonic()
    try:
        is_actor_alive("0" * 32, timeout=5)
    except RayStateApiException:
        return True, time.monotonic() - began
    return False, time.monotonic() - began


def test_who_asks_whether_a_controller_lives_is_not_sent_to_another_cluster() -> None:
    """That of the last `ray start` on this machine, which may be gone, or know nothing of our actors."""
    refused, seconds = ray.get(ray.remote(num_cpus=0)(ask).remote())
    assert refused
    assert seconds < 5
