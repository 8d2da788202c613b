from __future__ import annotations

import threading
from pathlib import Path

import pytest
from ray.exceptions import RpcError
from small_run import small_config

from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.execution.ray import monitoring, ray_internals
from moedisco_ray.execution.ray.monitoring import idle_slots, reporting_idle_slots

GROUP = "8f3b" * 9


def test_what_a_group_keeps_for_a_worker_to_come_is_idle_slots() -> None:
    nodes = [
        {"CPU": 2.0, "high_mem_gpu": 1.0, "other_gpu": 5.0},
        # Two bundles of a group, one of which a worker holds: Ray lists each bundle and their sum.
        {f"high_mem_gpu_group_{GROUP}": 1.0, f"high_mem_gpu_group_1_{GROUP}": 1.0, f"bundle_group_{GROUP}": 1000.0},
        {"high_mem_gpu.large": 3.0, f"other_gpu_group_{GROUP}": 2.0},
    ]
    assert idle_slots(nodes, "high_mem_gpu") == 2
    assert idle_slots(nodes, "other_gpu") == 7
    assert idle_slots([], "high_mem_gpu") == 0


def test_a_look_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers = [{"node": {"high_mem_gpu": 1.0}}, RpcError("no answer"), {"node": {"high_mem_gpu": 0.0}}]
    emitted: list[int] = []
    done = threading.Event()

    def available() -> dict[str, dict[str, float]]:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, RpcError):
            raise answer
        return answer

    def emit(event: Event) -> None:
        emitted.append(event.data["slots"])
        if len(emitted) in (1, 3):  # the disk is full for a moment, each time
            raise OSError(28, "No space left on device")
        if len(emitted) == 4:
            done.set()

    answers.insert(0, answers[0])
    monkeypatch.setattr(ray_internals, "available_resources_per_node", available)
    with reporting_idle_slots(small_config(tmp_path), emit, lambda tag: 2 * (tag == "high_mem_gpu"), interval=0.001):
        assert done.wait(10)
    assert emitted == [3, 3, 2, 2]  # two more are held by seats without work


def test_the_metric_of_dollars_is_what_the_bill_charges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Earlier attempts count, and each hold costs the price at which it began."""
    values: dict[str, float] = {}

    class Recorded:
        def __init__(self, name: str, *_: object) -> None:
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[f"{self._name} {tags.get('pool', '')}"] = value

    monkeypatch.setattr(monitoring, "Gauge", Recorded)
    config = small_config(tmp_path)
    log = EventLog(config.directory / "events.jsonl")
    for attempt, price in enumerate((1.0, 3.0)):
        log(Event("run_started", data={}, time=1e4 * attempt))
        held = {"hold": str(attempt), "pool": "low_memory", "workers": 1, "price_per_hour": price}
        log(Event("workers_held", "seed", data=held, time=1e4 * attempt))
        log(Event("heartbeat", time=1e4 * attempt + 3600))
    log.close()
    gauges = monitoring.Gauges(config, EventLog.read(config.directory / "events.jsonl"))
    gauges(Event("heartbeat", time=1e4 + 7200))
    assert values["moedisco_dollars low_memory"] == pytest.approx(1.0 + 2 * 3.0)
