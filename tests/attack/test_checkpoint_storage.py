"""Checkpoints in `checkpoint.storage` go with their run, count in its owner's quota, and are found if they are left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import PlanningHere, Service, demo, service
from reconciling import Scene
from s3_standin import s3_server

from moedisco_ray.core.store import remote
from moedisco_ray.core.store.locations import CACHE, Location, is_uri, joined
from moedisco_ray.core.store.remote import Remote
from service.background.housekeeping import Housekeeping

SIZE = 5000
DAY = 24 * 3600.0


@pytest.fixture(params=["directory", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A storage root."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    if request.param == "directory":
        (tmp_path / "checkpoints").mkdir()
        yield str(tmp_path / "checkpoints")
    else:
        with s3_server("checkpoints"):
            yield "s3://checkpoints/moe"


@pytest.fixture
def api(storage: str, tmp_path: Path) -> Iterator[Service]:
    with service(tmp_path, PlanningHere(), storage_roots=(storage,)) as made:
        yield made


def stored(storage: str) -> dict[str, int]:
    return {name: size for name, size in Remote(storage, "storage", ()).list().items() if size}


def tidy(api: Service, now: float) -> None:
    Housekeeping(api.database, api.jobs, api.settings.roots, 60.0).round(now)


def cancelled(api: Service, scene: Scene, storage: str, name: str, options: str = "") -> str:
    """A run that was cancelled after its driver had written a checkpoint."""
    config = demo(name=name, checkpoint={"storage": f"{storage}/team{options}"})
    run_id = api.ann.post("/v1/runs", json={"config": config}).json()["id"]
    scene.round()
    asked = json.loads(scene.place(run_id).request.read_text())["checkpoint"]["storage"]
    Remote(joined(asked, f"{name}-0123456789ab", "seed", "step-0000001"), "storage", ()).write(
        "__0_0.distcp", bytes(SIZE)
    )
    scene.begins(run_id)
    scene.round()
    assert api.ann.post(f"/v1/runs/{run_id}/cancel").status_code == 202
    scene.jobs.ends(scene.job(run_id), 3)
    scene.round(2)
    assert scene.run(run_id).state == "cancelled"
    return run_id


def test_submit_cancel_delete_does_not_fill_the_storage(api: Service, storage: str, tmp_path: Path):
    """Checkpoints count in the quota as long as the run is there, and are deleted with it.

    Before (af276e38): each run leaves its checkpoint for good, and the quota says 0 bytes.
    """
    scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
    for number in range(2):
        run_id = cancelled(api, scene, storage, f"run-{number}")
        tidy(api, time.time())
        shown = api.ann.get(f"/v1/runs/{run_id}").json()
        assert sum(stored(storage).values()) == SIZE
        assert shown["disk_bytes"] >= SIZE
        assert api.ann.get("/v1/quota").json()["disk_bytes"]["used"] >= SIZE
        assert shown["config"]["checkpoint"]["storage"] == f"{storage}/team"
        keep = {"keep_artifacts": "true"} if number % 2 else {}
        assert api.ann.delete(f"/v1/runs/{run_id}", params=keep).status_code == 204
        assert stored(storage) == {}


def test_retention_deletes_the_checkpoints_of_a_run(api: Service, storage: str, tmp_path: Path):
    """Before (af276e38): the run goes, its checkpoint stays."""
    scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
    run_id = cancelled(api, scene, storage, "old")
    assert api.admin.put("/v1/policies", json={"default": {"retention": {"days": 1}}}).status_code == 200
    ended = scene.run(run_id).ended
    for days in (0, 2, 4):
        tidy(api, ended + days * DAY)
    assert api.ann.get(f"/v1/runs/{run_id}").status_code == 404
    assert stored(storage) == {}


def test_checkpoints_that_were_left_are_swept_and_nothing_else(
    api: Service, storage: str, tmp_path: Path, caplog, capfd
):
    """Checkpoints of a deleted run are removed a day later.

    Files that this service did not write stay; the log and the audit log name them once.

    Before (af276e38): nothing looks for them.
    """
    scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
    run_id, known = (cancelled(api, scene, storage, name) for name in ("gone", "known"))
    assert api.ann.delete(f"/v1/runs/{run_id}").status_code == 204
    foreign, other = "team/01JDB5W3XQ3N8QZ7V0G6M4T9KE/x/file", "team/datasets/file"
    for path in (f"team/{run_id}/left/step-0000002/file", foreign, other):
        Remote(storage, "storage", ()).write(path, b"left")
    tidy(api, time.time() + 60)
    assert {f"team/{run_id}/left/step-0000002/file", foreign, other} < set(stored(storage))
    tidy(api, time.time() + 2 * DAY)
    left = stored(storage)
    assert {foreign, other} < set(left)
    assert [name for name in left if run_id in name] == []
    assert [name for name in left if known in name or "known-" in name] != []
    tidy(api, time.time() + 3 * DAY)
    entries = [(entry["action"], entry["target"]) for entry in api.admin.get("/v1/audit").json()["items"]]
    assert entries.count(("checkpoints.removed", run_id)) == 1
    assert entries.count(("checkpoints.unknown", f"{storage}/team/01JDB5W3XQ3N8QZ7V0G6M4T9KE")) == 1
    assert {foreign, other} < set(stored(storage))
    said = capfd.readouterr()
    assert "01JDB5W3XQ3N8QZ7V0G6M4T9KE belongs to no run of this service" in caplog.text + said.out + said.err


@pytest.mark.parametrize("remaining", [True, False])
def test_a_bucket_is_swept_with_the_options_of_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remaining: bool
):
    """The options come from a run that remains, or from the audit log.

    Before (af276e38): nothing looks for left checkpoints.
    """
    region, resolve = "?region=eu-west-1", remote.resolve
    bucket = f"remaining-{remaining}".lower()
    root = f"s3://{bucket}"

    def in_its_region_alone(location: Location) -> tuple[Any, str]:
        if is_uri(location) and region not in str(location):
            raise OSError("the bucket is in another region")
        return resolve(location)

    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "resolve", in_its_region_alone)
    with s3_server(bucket), service(tmp_path, storage_roots=(root,)) as api:
        scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
        deleted, other = (cancelled(api, scene, root, name, region) for name in ("deleted", "other"))
        for run_id in (deleted,) if remaining else (deleted, other):
            assert api.ann.delete(f"/v1/runs/{run_id}").status_code == 204
        Remote(f"{root}{region}", "storage", ()).write(f"team/{deleted}/left/file", b"left")
        tidy(api, time.time() + 2 * DAY)
        left = stored(f"{root}{region}")
    assert [name for name in left if deleted in name] == []
    assert (left != {}) == remaining


def test_a_retry_and_a_resumed_run_have_folders_of_their_own(api: Service, storage: str, tmp_path: Path):
    scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
    run_id = cancelled(api, scene, storage, "first")
    again = api.ann.post(f"/v1/runs/{run_id}/retry").json()
    assert again["config"]["checkpoint"]["storage"] == f"{storage}/team"
    assert api.ann.post(f"/v1/runs/{run_id}/resume").status_code == 202
    scene.round()
    asked = {
        json.loads(scene.place(each).request.read_text())["checkpoint"]["storage"] for each in (run_id, again["id"])
    }
    assert asked == {f"{storage}/team/{run_id}", f"{storage}/team/{again['id']}"}


def test_a_planted_link_does_not_lead_the_deletion_elsewhere(tmp_path: Path):
    """A driver replaces the folder above its own by a link to another directory."""
    root, victim = tmp_path / "checkpoints", tmp_path / "victim"
    root.mkdir()
    with service(tmp_path, PlanningHere(), storage_roots=(str(root),)) as api:
        scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools)
        run_id = cancelled(api, scene, str(root), "linked")
        (victim / run_id).mkdir(parents=True)
        (victim / run_id / "precious").write_text("x")
        (root / "team").rename(root / "moved")
        (root / "team").symlink_to(victim)
        assert api.ann.delete(f"/v1/runs/{run_id}").status_code == 204
        tidy(api, time.time() + 2 * DAY)
    assert (victim / run_id / "precious").exists()
