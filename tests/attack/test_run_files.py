"""A driver may put anything into its run directory; the service neither follows it nor waits for it."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api_client import Service, demo
from reconciling import FINISH, Scene

from service import run_files, run_homes
from service.background import spool
from service.background.housekeeping import Housekeeping
from service.background.reconciler import Reconciler
from service.database import runs
from service.database.ids import new_id
from service.database.session import Database
from service.domain.states import RunState
from service.ray_side.dashboard import auth_headers
from service.run_storage import DirectoryRun

USER = "nobody"
FINISHED = (RunState.STARTING, RunState.RUNNING, RunState.SUCCEEDED)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories to another user")


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'service.sqlite3'}")) as database:
        database.migrate()
        yield Scene.on(database, tmp_path)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Scene]:
    """With drivers of another user, who can pass through every directory on the way."""
    root = Path(tempfile.mkdtemp(prefix="moe-"))
    root.chmod(0o755)
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'service.sqlite3'}")) as database:
        database.migrate()
        yield Scene.on(database, root, driver_user=USER)
    shutil.rmtree(root)


def run_with(api: Service, state: RunState = RunState.SUCCEEDED) -> tuple[str, Path]:
    run_id = api.submit()["id"]
    directory = api.directory(run_id)
    api.bring(run_id, RunState.STARTING, attempt=1)
    api.bring(run_id, *([RunState.RUNNING] if state is RunState.RUNNING else [RunState.RUNNING, state]))
    return run_id, directory


def address(api: Service) -> Path:
    path = api.settings.state_dir / "address.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"url": "http://127.0.0.1", "token": "TOP SECRET", "stages": {"seed": "TOP SECRET"}}))
    return path


def linked_file(target: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def linked_folder(target: Path, place: Path) -> None:
    place.parent.symlink_to(target.parent)
    with contextlib.suppress(FileExistsError):
        (target.parent / place.name).symlink_to(target)


@pytest.mark.parametrize(
    ("question", "planted", "state", "plant"),
    [
        ("clusters", "clusters/report.json", RunState.SUCCEEDED, linked_file),
        ("report", "report.json", RunState.SUCCEEDED, linked_file),
        ("report", "report.json", RunState.SUCCEEDED, linked_folder),
        ("report", "clusters/report.json", RunState.RUNNING, linked_folder),
        ("report", "evaluation/evaluation.json", RunState.RUNNING, linked_file),
        ("logs/worker", "logs/worker.log", RunState.RUNNING, linked_folder),
    ],
)
def test_a_link_in_a_run_directory_shows_nothing_of_its_target(
    api: Service, question: str, planted: str, state: RunState, plant: Callable[[Path, Path], None]
) -> None:
    run_id, directory = run_with(api, state)
    if plant is linked_folder and "/" not in planted:
        directory.rmdir()
    plant(address(api), directory / planted)
    answer = api.ann.get(f"/v1/runs/{run_id}/{question}")
    assert answer.status_code in (200, 404), answer.text
    assert "TOP SECRET" not in answer.text
    assert "127.0.0.1" not in answer.text


@pytest.mark.parametrize("planted", ["clusters/report.json", "events.jsonl", "corpus/manifest.json"])
def test_a_pipe_holds_up_no_reader(api: Service, planted: str) -> None:
    run_id, directory = run_with(api, RunState.RUNNING)
    (directory / planted).parent.mkdir(exist_ok=True)
    os.mkfifo(directory / planted)
    assert api.ann.get(f"/v1/runs/{run_id}/report").status_code == 200
    assert api.ann.get(f"/v1/runs/{run_id}/clusters").status_code == 404


def test_a_folder_of_links_lists_no_names_of_other_places(api: Service, tmp_path: Path) -> None:
    run_id, directory = run_with(api)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "private.log").write_text("x")
    (directory / "logs").symlink_to(elsewhere)
    (directory / "model").symlink_to(elsewhere)
    assert api.ann.get(f"/v1/runs/{run_id}/logs").json()["items"] == []
    assert api.ann.get(f"/v1/runs/{run_id}/artifacts").json()["items"] == []
    assert api.ann.get(f"/v1/runs/{run_id}/model.tar").status_code == 404
    assert api.ann.head(f"/v1/runs/{run_id}/model.tar").status_code == 404


def test_a_report_that_is_too_large_or_no_report_is_one_clear_answer(api: Service) -> None:
    run_id, directory = run_with(api)
    with (directory / "report.json").open("wb") as file:
        file.truncate(2**40)
    answer = api.ann.get(f"/v1/runs/{run_id}/report")
    assert (answer.status_code, "is larger than" in answer.text) == (404, True)
    for content in ("[" * 100_000, "[1]", "nonsense"):
        (directory / "report.json").write_text(content)
        assert api.ann.get(f"/v1/runs/{run_id}/report").status_code == 404


@pytest.mark.parametrize("kind", ["pipe", "zero", "link", "folder"])
def test_what_a_driver_puts_in_place_of_its_events_does_not_hold_up_the_reconciler(scene: Scene, kind: str) -> None:
    run_id = scene.running()
    events = scene.place(run_id).events
    events.unlink()
    if kind == "pipe":
        os.mkfifo(events)
    elif kind == "folder":
        events.mkdir()
    elif kind == "zero":
        events.symlink_to("/dev/zero")
    else:
        other = scene.root / "events"
        other.write_text(FINISH.to_json() + "\n")
        events.symlink_to(other)
    scene.jobs.ends(scene.job(run_id), exit_code=2)
    scene.round()
    assert scene.run(run_id).state == "failed"


@pytest.mark.parametrize(
    "line",
    [
        b"x" * (3 * spool.LONGEST_LINE),
        b"[" * 500_000,
        b'{"type": "warning", "data": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
    ],
)
def test_a_hostile_line_does_not_hide_the_lines_after_it(scene: Scene, line: bytes) -> None:
    run_id = scene.running()
    with scene.place(run_id).events.open("ab") as file:
        file.write(line + b"\n")
    scene.leave(run_id, FINISH)
    scene.jobs.ends(scene.job(run_id))
    scene.round()
    assert scene.run(run_id).state == "succeeded"


def test_a_batch_of_events_is_bounded_in_bytes(tmp_path: Path) -> None:
    line = b'{"type": "warning", "data": {"message": "' + b"x" * 2**19 + b'"}, "time": 1.0}\n'
    (tmp_path / "events.jsonl").write_bytes(line * 40)
    batches = list(spool.unread(DirectoryRun(tmp_path), 3))
    assert [first for first, _ in batches] == [3, 19, 35]
    assert sum(len(events) for _, events in batches) == 37


def test_a_token_in_a_directory_of_the_drivers_is_read_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "admin-token").write_text("mdt_secret")
    (tmp_path / "auth_token").symlink_to(tmp_path / "admin-token")
    assert auth_headers(tmp_path / "auth_token") == {}
    (tmp_path / "auth_token").unlink()
    os.mkfifo(tmp_path / "auth_token")
    assert auth_headers(tmp_path / "auth_token") == {}


def test_no_run_is_made_in_a_runs_directory_or_where_housekeeping_removes(api: Service) -> None:
    run = api.submit()["id"]
    root = str(api.settings.output_roots[0])
    for output in (run, f"{root}/{run}/demo/x", f"team/{run}", f"{run.lower()}/x", f"{root}/.removed-x", "team/.x"):
        answer = api.ann.post("/v1/runs", json={"config": demo(output=output)})
        assert answer.status_code == 422, answer.text
        assert answer.json()["errors"][0]["field"] == "config.output"
    assert api.ann.post("/v1/runs", json={"config": demo(output="team/a")}).status_code == 201


def test_a_link_into_a_runs_directory_is_no_output(api: Service) -> None:
    run = api.submit()["id"]
    api.directory(run)
    (api.settings.output_roots[0] / "short").symlink_to(api.settings.output_roots[0] / run)
    answer = api.ann.post("/v1/runs", json={"config": demo(output="short")})
    assert (answer.status_code, "is the name of a run's directory" in answer.text) == (422, True)


@as_root
def test_a_home_that_became_a_link_is_neither_written_nor_given_away(guarded: Scene) -> None:
    victim = guarded.root / "victim"
    victim.mkdir()
    run_id = guarded.submit()
    guarded.settings.output_roots[0].mkdir()
    guarded.place(run_id).home.symlink_to(victim)
    guarded.round()
    run = guarded.run(run_id)
    assert (run.state, "is a link" in run.reason) == ("failed", True)
    guarded.change(run_id, RunState.QUEUED)
    guarded.change(run_id, RunState.STARTING, attempt=2)
    guarded.change(run_id, RunState.STOPPING, stop="cancelled")
    guarded.round()
    assert guarded.run(run_id).state == "cancelled"
    assert list(victim.iterdir()) == []
    assert victim.stat().st_uid == 0


@as_root
def test_a_run_in_a_drivers_directory_is_not_started_and_nothing_outside_is_touched(guarded: Scene) -> None:
    """As if it had been accepted before the rule: the outer driver exchanges a folder of its own for a link."""
    outer = guarded.running()
    victim = guarded.root / "victim"
    victim.mkdir()
    inner = guarded.submit(owner="bob")
    directory = guarded.place(outer).directory / "x" / inner / "demo"
    with guarded.database.write() as session:
        runs.amend(session, runs.lock(session, inner), now=guarded.now, directory=str(directory))
    (guarded.place(outer).directory / "x").symlink_to(victim)
    guarded.round()
    assert guarded.run(inner).state == "failed"
    assert list(victim.iterdir()) == []


@as_root
@pytest.mark.parametrize("owner", [USER, "daemon"])
def test_a_home_that_another_user_made_is_refused(guarded: Scene, owner: str) -> None:
    run_id = guarded.submit()
    home = guarded.place(run_id).home
    home.mkdir(parents=True)
    os.chown(home, pwd.getpwnam(owner).pw_uid, -1)
    guarded.round()
    run = guarded.run(run_id)
    assert (run.state, "belongs to" in run.reason) == ("failed", True)
    assert list(home.iterdir()) == []


def tidy(scene: Scene) -> None:
    Housekeeping(scene.database, scene.jobs, scene.settings.roots, scene.settings.session_idle_seconds).round(scene.now)


def test_housekeeping_removes_only_what_it_set_aside(scene: Scene) -> None:
    root, run_id = scene.settings.output_roots[0], scene.submit()
    names = [".removed-x", f".removed-{run_id}", f".removed-{new_id()}x", f"x.removed-{new_id()}"]
    for name in (*names, gone := f".removed-{new_id()}"):
        (root / name / "demo").mkdir(parents=True)
    tidy(scene)
    assert sorted(path.name for path in root.iterdir()) == sorted(names)
    assert not (root / gone).exists()


def test_a_directory_with_another_run_in_it_is_not_set_aside(scene: Scene) -> None:
    outer, inner = scene.submit(), scene.submit(owner="bob")
    home = scene.place(outer).home
    with scene.database.write() as session:
        runs.amend(session, runs.lock(session, inner), now=scene.now, directory=str(home / "demo" / inner / "demo"))
    (home / "demo" / inner / "demo").mkdir(parents=True)
    with scene.database.read() as session:
        assert (runs.inside(session, home, outer), runs.inside(session, scene.place(inner).home, inner)) == (
            inner,
            None,
        )
    with pytest.raises(PermissionError, match=f"it contains the directory of run {inner}"):
        run_homes.set_aside(home, outer, scene.settings.roots.homes, inner)
    assert home.exists()


def test_deleting_a_run_leaves_the_files_of_one_inside_it(api: Service) -> None:
    outer, inner = api.submit()["id"], api.submit("bob")["id"]
    nested = api.directory(outer) / inner / "demo"
    with api.database.write() as session:
        runs.amend(session, runs.lock(session, inner), now=1.0, directory=str(nested))
    nested.mkdir(parents=True)
    (nested / "weights").write_text("x")
    assert api.ann.delete(f"/v1/runs/{outer}").status_code == 204
    assert (nested / "weights").exists()


def deepen(directory: Path, levels: int) -> None:
    """Folders in one another; their path is longer than the system takes at once."""
    step = os.open(directory, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=step)
        following = os.open("d", os.O_RDONLY, dir_fd=step)
        os.close(step)
        step = following
    os.close(step)


def test_folders_that_are_too_deep_stop_neither_the_listing_nor_the_measuring(tmp_path: Path) -> None:
    deepen(tmp_path, 1500)
    try:
        assert run_files.size_of(tmp_path) == 0
    finally:
        flatten(tmp_path)


def flatten(directory: Path) -> None:
    """Take apart what `deepen` made, from above: each folder's content is moved up before the folder is removed."""
    while (directory / "d").exists():
        (directory / "d").rename(directory / "old")
        if (directory / "old" / "d").exists():
            (directory / "old" / "d").rename(directory / "d")
        (directory / "old").rmdir()


def test_a_run_that_is_resumed_is_confined_to_the_roots_of_today(api: Service, tmp_path: Path) -> None:
    (tmp_path / "data" / "mine").mkdir()
    made = api.ann.post("/v1/runs", json={"config": demo(corpus={"sources": [{"path": "mine/*.txt"}]})})
    assert made.status_code == 201, made.text
    run_id = made.json()["id"]
    narrowed = api.settings.model_copy(update={"input_roots": (str(tmp_path / "data" / "other"),)})
    reconciler = Reconciler(api.database, api.jobs, api.pools, api.notifier, settings=narrowed, secret=b"secret")
    reconciler.round(1.0)
    answer = api.ann.get(f"/v1/runs/{run_id}").json()
    assert (answer["state"], "is outside of the input roots" in answer["reason"]) == ("failed", True)
    assert api.jobs.submissions == {}
    assert api.ann.post(f"/v1/runs/{run_id}/resume").status_code == 202
    Reconciler(api.database, api.jobs, api.pools, api.notifier, settings=api.settings, secret=b"secret").round(20.0)
    assert list(api.jobs.submissions) == [f"{run_id}-2"]


def test_a_link_that_was_made_after_a_run_was_submitted_is_followed_before_it_starts(
    api: Service, tmp_path: Path
) -> None:
    (tmp_path / "data" / "mine").mkdir()
    run_id = api.submit(corpus={"sources": [{"path": "mine/*.txt"}]})["id"]
    (tmp_path / "data" / "mine").rmdir()
    (tmp_path / "data" / "mine").symlink_to(tmp_path / "secret")
    Reconciler(api.database, api.jobs, api.pools, api.notifier, settings=api.settings, secret=b"secret").round(1.0)
    answer = api.ann.get(f"/v1/runs/{run_id}").json()
    assert (answer["state"], "is a link out of" in answer["reason"]) == ("failed", True)
    assert api.jobs.submissions == {}


def test_a_model_directory_that_is_a_link_is_no_start(api: Service, tmp_path: Path) -> None:
    run_id, directory = run_with(api)
    (directory / "model").symlink_to(tmp_path / "secret")
    answer = api.ann.post("/v1/runs", json={"config": demo(tokenizer={"path": f"run://{run_id}/model"})})
    assert (answer.status_code, "is a link" in answer.text) == (422, True)
    assert "TOP SECRET" not in answer.text


def test_a_stored_configuration_that_is_no_longer_valid_ends_its_run_and_no_other(scene: Scene) -> None:
    broken, fine = scene.submit(), scene.submit(owner="bob")
    with scene.database.write() as session:
        run = runs.lock(session, broken)
        runs.amend(session, run, now=scene.now, config=run.config | {"of_an_older_version": 1})
    scene.round()
    assert (scene.run(broken).state, scene.run(fine).state) == ("failed", "starting")
    assert "of_an_older_version" in (scene.run(broken).reason or "")
