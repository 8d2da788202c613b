"""Nodes that offer a GPU which torch cannot use, as on this machine. On others, the CPU stands in for the GPU."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from failing_jobs import here, make_job
from ray.cluster_utils import Cluster
from ray.train.torch import TorchConfig
from small_run import begin_at, small_config

from moedisco_ray.backend import Placement
from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool
from moedisco_ray.core.errors import CardError
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.stop_file import NEVER
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.ray import attempts
from moedisco_ray.execution.ray.backend import train_all, train_gang
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.session import NO_DASHBOARD
from moedisco_ray.execution.ray.tasks import Slot

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

LOW, HIGH = LowMemoryPool(gpu=1), HighMemoryPool(gpu=1, workers=2)
STEPS, LONG = 12, 4000
WORKS, HANGS, FAILS = "TEST_CARD_WORKS", "TEST_CARD_HANGS", "TEST_CARD_FAILS"


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of raylets on this machine; on nodes with the variable `WORKS`, the CPU stands in for the GPU.

    On those with `HANGS`, a GPU never answers. On those with `FAILS`, the first GPU fails in each sixth step.
    """
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.shutdown()  # the shared cluster of other tests, if it is connected

    def stand_in() -> None:
        if WORKS in os.environ:
            worker = importlib.import_module("moedisco_ray.execution.ray.worker")
            worker.get_device = lambda: worker.torch.device("cpu")
            importlib.import_module("moedisco_ray.execution.ray.card_check").own_cards = lambda: [("0", "cpu")]
        if FAILS in os.environ:
            worker = importlib.import_module("moedisco_ray.execution.ray.worker")
            trains = worker.train

            def train(job: Any, world: Any, emit: Any, should_stop: Any, on_step: Any, **settings: Any) -> Any:
                def begin(step: int | None) -> None:
                    if step == 5 and ray.get_gpu_ids() == [0]:
                        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
                    on_step(step)

                return trains(job, world, emit, should_stop, begin, **settings)

            worker.train = train
        if HANGS in os.environ:
            importlib.import_module("moedisco_ray.execution.ray.card_check").own_cards = lambda: time.sleep(3600)

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000},
    )
    ray.init(
        address=cluster.address,
        runtime_env={**copy.deepcopy(dict(NO_DASHBOARD)), "worker_process_setup_hook": stand_in},  # Ray adds to it
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Cluster, slots: int = 1, *, works: bool = False, hangs: bool = False, fails: bool = False) -> str:
    """Add a node with a slot of both pools for each GPU; returns its id."""
    node = cluster.add_node(
        num_cpus=2,
        num_gpus=slots,
        resources={"low_mem_gpu": slots, "high_mem_gpu": slots},
        object_store_memory=80_000_000,
        env_vars={name: "1" for name, is_set in ((WORKS, works), (HANGS, hangs), (FAILS, fails)) if is_set},
    )
    return str(node.node_id)


def left_out(events: list[Event]) -> list[str]:
    """Warnings about nodes that are put aside; others are about waiting."""
    lines = [event.data["message"] for event in events if event.type == "warning"]
    return [line for line in lines if line.endswith("; the run continues without this node")]


def nodes_of(events: list[Event]) -> set[str]:
    return {event.data["node_id"] for event in events if event.type == "unit_started"}


def test_a_run_whose_only_card_torch_cannot_use_ends_at_once_and_says_why(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    """Before (cc240f74): the run trained on the CPU to its end."""
    add_node(cluster)
    config = small_config(tmp_path, pools={"low_memory": {"gpu": 1, "max_workers": 2}})
    begin_at("submodels", config, undisturbed)
    began = time.monotonic()
    with pytest.raises(CardError, match=r"^pools\.low_memory\.gpu: 1: torch cannot use card 0 of node .*; install a"):
        pipeline.run(config)
    assert time.monotonic() - began < 60
    last = EventLog.read(config.directory / "events.jsonl")[-1]
    assert last.type == "run_failed"
    assert not list((config.directory / "submodels").glob("*/model.safetensors"))


def test_sub_models_train_on_the_node_whose_card_works(mixed: Cluster, tmp_path: Path) -> None:
    bad = add_node(mixed, slots=2)
    good = add_node(mixed, works=True)
    jobs = [dataclasses.replace(make_job(tmp_path / name, STEPS), name=name) for name in ("one", "two", "three")]
    events: list[Event] = []
    trained = train_all(jobs, Placement(LOW, workers=1, max_failures=0), tmp_path / "ray", events.append)
    assert [each.result.losses for each in trained] == [here(jobs[0]).losses] * 3
    assert len(left_out(events)) == 1
    assert nodes_of(events) == {good}
    assert bad not in nodes_of(events)
    assert not [event for event in events if event.type == "worker_restarted"]  # no training is to blame


def test_a_card_that_fails_twice_gets_no_more_work_and_the_other_of_its_node_does_it(
    mixed: Cluster, tmp_path: Path
) -> None:
    """Before: a failure at one step was the batch's fault, so the training skipped it, and then was given up."""
    add_node(mixed, slots=2, works=True, fails=True)
    jobs = [
        dataclasses.replace(make_job(tmp_path / name, LONG), name=name, checkpoint_every=LONG, log_every=100)
        for name in ("one", "two")
    ]
    events: list[Event] = []
    trained = train_all(jobs, Placement(LOW, workers=1, max_failures=1), tmp_path / "ray", events.append)
    assert [each.result.losses for each in trained] == [here(jobs[0]).losses] * 2
    warnings = [event.data["message"] for event in events if event.type == "warning"]
    [line] = [each for each in warnings if each.startswith("trainings failed 2 times in a row on card 0 of node ")]
    assert "ECC" in line
    assert [event.data["kind"] for event in events if event.type == "worker_restarted"] == ["failed", "bad_card"]


def test_other_work_goes_to_the_node_whose_card_works(mixed: Cluster) -> None:
    add_node(mixed)
    events: list[Event] = []

    def node() -> str:
        return str(ray.get_runtime_context().get_node_id())

    with Seats("run") as seats:
        with pytest.raises(CardError, match=r"pools\.low_memory\.gpu"):
            Slot(LOW, events.append, NEVER, seats).run(node)
        good = add_node(mixed, works=True)
        assert Slot(LOW, events.append, NEVER, seats).run(node) == good
    assert len(left_out(events)) == 1


@pytest.mark.parametrize("works", [False, True])
def test_a_gang_leaves_the_node_out_or_ends(
    mixed: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    monkeypatch.setattr(attempts, "TorchConfig", functools.partial(TorchConfig, backend="gloo"))  # NCCL needs a GPU
    add_node(mixed, slots=2)
    job = make_job(tmp_path, STEPS)
    events: list[Event] = []
    if works:
        good = add_node(mixed, works=True), add_node(mixed, works=True)
        trained = train_gang(job, HIGH, 0, tmp_path / "ray", events.append)
        assert trained.result.losses == pytest.approx(here(job).losses, rel=1e-4)
        assert nodes_of(events) <= set(good)
        assert len(left_out(events)) == 1
    else:
        with pytest.raises(CardError, match=r"^pools\.high_memory\.gpu: 1: torch cannot use card [01] of node"):
            train_gang(job, HIGH, 0, tmp_path / "ray", events.append)
        assert len(left_out(events)) == 1
        assert not nodes_of(events)


def test_a_gang_does_not_wait_for_a_card_that_never_answers(
    mixed: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before (a0c02aba): the gang waited for the card until the test's own limit of 300 s, without a warning."""
    monkeypatch.setattr(attempts, "TorchConfig", functools.partial(TorchConfig, backend="gloo"))  # NCCL needs a GPU
    monkeypatch.setattr(attempts, "CHECK_SECONDS", 45.0, raising=False)
    hanging = add_node(mixed, slots=2, hangs=True)
    job = make_job(tmp_path, STEPS)
    events: list[Event] = []
    with pytest.raises(CardError, match=r"^pools\.high_memory\.gpu: 1: torch does not finish a small product on a GPU"):
        train_gang(job, HIGH, 0, tmp_path / "ray", events.append)
    (line,) = left_out(events)
    assert hanging in line
