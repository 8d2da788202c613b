"""The fine-tune's gang on a cluster whose nodes come and go."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from small_run import small_config
from waiting import until

from moedisco_ray.backend import Placement, Trained
from moedisco_ray.core.config import HighMemoryPool
from moedisco_ray.core.records.events import Emit, Event
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray import session
from moedisco_ray.execution.ray.autoscaling.reservation import Reservation
from moedisco_ray.execution.ray.backend import train_gang
from moedisco_ray.training import TrainJob

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

STEPS = 2500


def add_node(cluster: Cluster, slots: int = 1) -> object:
    return cluster.add_node(num_cpus=slots, resources={"high_mem_gpu": slots}, object_store_memory=80_000_000)


def job(run: Path, directory: Path, steps: int) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="finetune",
        model=run / "merged",
        packed_dirs=(run / "corpus" / "shards",),
        output=directory / "trained",
        checkpoints=directory / "steps",
        steps=steps,
        sequence_length=64,
        optimizer=small_config(run.parent).finetune.optimizer,
        checkpoint_every=50,
        load_balance=0.01,
        z_loss=0.001,
    )


def train(job: TrainJob, workers: int | tuple[int, int], emit: Emit = lambda _: None) -> Trained:
    return train_gang(job, HighMemoryPool(workers=workers), 0, job.output.parent / "ray", emit)


def nothing_is_left() -> None:
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


def test_a_gang_grows_with_a_node_shrinks_with_its_loss_and_learns_the_same(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    add_node(cluster)
    events: list[Event] = []

    def steps_by(workers: int) -> int:
        """The last step that a gang of this size reported, if it is the newest."""
        sizes = [event.data["workers"] for event in events if event.type == "unit_started"]
        steps = [event.data["step"] for event in events if event.type == "progress"]
        return steps[-1] if steps and sizes[-1] == workers and events[-1].type == "progress" else 0

    alone = LocalBackend().train_gang(
        job(undisturbed, tmp_path / "alone", STEPS), HighMemoryPool(), 0, tmp_path, lambda _: None
    )
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train, job(undisturbed, tmp_path / "gang", STEPS), (1, 2), events.append)
        until(lambda: steps_by(1))
        second = add_node(cluster)
        reached = until(lambda: steps_by(2), 120)
        cluster.remove_node(second, allow_graceful=False)
        trained = training.result()
    assert [event.data["workers"] for event in events if event.type == "unit_started"] == [1, 2, 1]
    assert [event.data["kind"] for event in events if event.type == "worker_restarted"] == ["grown", "preempted"]
    assert trained.result.steps == STEPS
    assert trained.result.restored_step > reached - 50
    assert 1 < trained.workers < 2
    assert trained.result.losses[:100] == pytest.approx(alone.result.losses[:100], rel=1e-4)
    assert trained.result.loss == pytest.approx(alone.result.loss, rel=0.02)
    nothing_is_left()


def test_a_fixed_gang_makes_the_same_bits_again(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    add_node(cluster, 2)
    for name in ("once", "again"):
        train(job(undisturbed, tmp_path / name, 60), 2)
    once, again = (sorted((tmp_path / name / "trained").glob("*.safetensors")) for name in ("once", "again"))
    assert len(once) == 2  # each worker writes a file
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in again]


def test_ray_train_knows_the_metrics_and_the_newest_checkpoint(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    add_node(cluster, 2)
    kept = tmp_path / "name-of-the-run"
    stale = {
        "ray_version": ray.__version__,
        "checkpoint_results": [{"checkpoint_dir_name": "steps/gone", "metrics": {}}],
    }
    kept.mkdir()
    # an earlier attempt's: its checkpoint was deleted since
    write_json(kept / "checkpoint_manager_snapshot.json", stale)
    trained = train(job(undisturbed, kept, 60), 2)
    known = read_json(kept / "checkpoint_manager_snapshot.json")["latest_checkpoint_result"]
    assert (kept / known["checkpoint_dir_name"] / "manifest.json").exists()
    assert known["checkpoint_dir_name"] == f"steps/step-{60:07}"
    assert known["metrics"]["step"] == 60
    assert known["metrics"]["loss"] == pytest.approx(trained.result.losses[-1], rel=0.2)


def test_rays_train_page_shows_every_attempt_at_a_gang_under_one_name(
    dashboard: str, undisturbed: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(
            train_gang,
            job(undisturbed, tmp_path / "name-of-the-run", 600),
            HighMemoryPool(workers=2),
            1,
            tmp_path / "ray",
            events.append,
        )
        until(
            lambda: training.done() or any(event.type == "progress" and event.data["step"] > 50 for event in events),
            120,
        )
        os.kill(next(event.data["pid"] for event in events if event.type == "unit_started"), signal.SIGKILL)
        assert training.result(300).result.steps == 600
    assert [event.data["kind"] for event in events if event.type == "worker_restarted"] == ["died"]

    def shown() -> list[tuple[str, str]]:
        runs = (
            httpx.get(f"{dashboard}/api/train/v2/runs/v1", timeout=30, trust_env=False)
            .raise_for_status()
            .json()["train_runs"]
        )
        return [(run["name"], run["status"]) for run in runs]  # the newest first

    until(lambda: shown() == [("name-of-the-run", "FINISHED"), ("name-of-the-run", "ERRORED")], 30)


def test_two_gangs_on_a_pool_that_holds_one_both_finish(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    add_node(cluster)
    add_node(cluster)
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(train, job(undisturbed, tmp_path / name, 60), 2) for name in ("one", "other")]
        assert all(future.result().result.finished for future in both)
    nothing_is_left()


def test_a_pool_without_a_node_is_waited_for_and_that_is_said(
    cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train, job(undisturbed, tmp_path, 30), 1, events.append)
        until(lambda: events)
        assert [event.data["message"] for event in events] == [
            "waits for 1 high_mem_gpu: no node of the Ray cluster offers it now"
        ]
        add_node(cluster)
        assert training.result().result.finished
    assert sum(event.type == "warning" for event in events) == 1


def test_a_node_that_comes_to_work_which_asks_itself_is_timed_too(cluster: Cluster) -> None:
    reservation = Reservation(HighMemoryPool(), "ahead")
    before = reservation.boot_times
    reservation.record()
    reservation.request(1)
    reservation.hand_over()
    assert (reservation.workers, reservation.boot_times) == (0, before)
    add_node(cluster)
    reservation.record()
    (boot,) = reservation.boot_times[len(before) :]
    assert 0 < boot < 60
    reservation.record()
    assert reservation.boot_times == [*before, boot]
    nothing_is_left()


def test_what_is_handed_over_is_known_to_be_free_next_to_a_slot_that_was(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Placement(HighMemoryPool(), 1, 0).bundle
    reservation = Reservation(HighMemoryPool(), "ahead")
    for _ in range(2):
        add_node(cluster)
    reservation.request(1)  # the other node's slot is free, as that of a merge that has ended
    until(lambda: reservation.held)
    assert session.free_workers(bundle) == 1
    monkeypatch.setattr(session, "VIEW_SECONDS", 0.0)
    reservation.hand_over()
    assert (reservation.workers, session.free_workers(bundle)) == (0, 2)
    nothing_is_left()


def test_a_reservation_holds_all_or_nothing_until_it_is_let_go(cluster: Cluster) -> None:
    pool = HighMemoryPool()
    bundle = Placement(pool, 1, 0).bundle
    reservation = Reservation(pool, "ahead")
    add_node(cluster)
    assert reservation.prepare([1000.0], [], 1, 2) == "wait"
    assert reservation.prepare([100.0], [200.0], 1, 2) == "ask"
    assert (reservation.workers, reservation.held, session.free_workers(bundle)) == (2, 0, 1)
    add_node(cluster)
    until(lambda: reservation.held)
    assert reservation.held == 2
    assert session.free_workers(bundle) == 0
    assert session.free_workers({"CPU": 1}) == 2  # a sub-model that lost its machine may go there meanwhile
    assert reservation.prepare([0.1], [], 1, 2) == "keep"
    assert len(reservation.boot_times) == 1
    # a node takes seconds, not the minutes that were assumed
    assert reservation.prepare([1000.0], [], 1, 2) == "release"
    until(lambda: session.free_workers(bundle) == 2)
    nothing_is_left()
