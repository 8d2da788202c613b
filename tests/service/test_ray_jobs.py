from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from moedisco_ray.core.store.read_roots import ReadRoots
from service.domain.jobs import JobPhase, JobState
from service.errors import RayUnavailable
from service.ray_side.dashboard import Dashboard, auth_headers
from service.ray_side.jobs import RayJobs, Submission, entrypoint

SUBMISSION = Submission(
    id="01ARZ3NDEKTSV4RRFFQ69G5FAV-1",
    run="01ARZ3NDEKTSV4RRFFQ69G5FAV",
    config_path=Path("/runs of ours/R/request.json"),
    stop_file=Path("/runs of ours/R/stop-1"),
    report_to=Path("/runs of ours/R/report-to-1"),
    read_roots=ReadRoots([Path("/data")], ["/own"], ["/runs"]),
    functions=["clean:keep"],
    metadata={"run": "R"},
)
Answer = Callable[[httpx.Request], httpx.Response]


def jobs(answer: Answer) -> RayJobs:
    return RayJobs(Dashboard("http://ray:8265/", Path("/nowhere"), httpx.MockTransport(answer)))


def job(name: str | None, status: str = "RUNNING", **more: object) -> dict[str, object]:
    """An element of what Ray 2.60 lists."""
    return {
        "type": "SUBMISSION" if name else "DRIVER",
        "job_id": "02000000",
        "submission_id": name,
        "driver_info": None,
        "status": status,
        "entrypoint": "exec python",
        "message": "as it is",
        "error_type": None,
        "start_time": 1,
        "end_time": None,
        "metadata": {},
        "runtime_env": {},
        "driver_agent_http_address": None,
        "driver_node_id": None,
        "driver_exit_code": None,
    } | more


def test_the_command_line_is_ours_alone():
    words = shlex.split(entrypoint(SUBMISSION))
    assert words == [
        "exec",
        "python",
        "-P",
        "-m",
        "moedisco_ray",
        "run",
        "/runs of ours/R/request.json",
        "--json",
        "--stop-file",
        "/runs of ours/R/stop-1",
        "--report-to",
        "/runs of ours/R/report-to-1",
        "--run-id",
        "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "--allow-code",
        "clean:keep",
    ]


def test_a_submission_carries_no_secret():
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"submission_id": SUBMISSION.id})

    jobs(answer).submit(SUBMISSION)
    [request] = asked
    body = json.loads(request.content)
    assert (request.method, str(request.url)) == ("POST", "http://ray:8265/api/jobs/")
    assert body == {
        "submission_id": SUBMISSION.id,
        "entrypoint": entrypoint(SUBMISSION),
        "metadata": {"run": "R"},
        "runtime_env": {
            "env_vars": {"MOEDISCO_READ_ROOTS": SUBMISSION.read_roots.to_json(), "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
        },
    }


def repeated(known: list[dict[str, object]]) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(500, text="Traceback\n  ...\nValueError: Job with submission_id X already exists.\n")
        return httpx.Response(200, json=known)

    return answer


def test_a_repeated_submission_is_no_error():
    jobs(repeated([job(SUBMISSION.id)])).submit(SUBMISSION)


def test_a_submission_that_ray_does_not_know_afterwards_failed():
    with pytest.raises(RayUnavailable, match="Ray answers 500: ValueError"):
        jobs(repeated([job("another")])).submit(SUBMISSION)


def test_jobs_are_listed_by_submission_id_and_plain_drivers_are_not():
    failed = job("b-1", "FAILED", message="exit code 3", driver_exit_code=3)
    listed = [job("a-1"), failed, job("c-1", "STOPPED"), job(None), job("d-1", "PENDING")]
    assert jobs(lambda _: httpx.Response(200, json=listed)).statuses() == {
        "a-1": JobState(JobPhase.RUNNING, "as it is"),
        "b-1": JobState(JobPhase.FAILED, "exit code 3", 3),
        "c-1": JobState(JobPhase.STOPPED, "as it is"),
        "d-1": JobState(JobPhase.PENDING, "as it is"),
    }


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(500, text="Traceback\nRpcError: GCS is down"),
        httpx.Response(200, text="<html>a proxy"),
        httpx.Response(200, json={"detail": "no"}),
        httpx.Response(200, json=[job("a", "LOST")]),
        httpx.Response(401),
        httpx.Response(403),
        httpx.Response(302, headers={"Location": "http://elsewhere/"}),
        httpx.Response(502, text=""),
    ],
)
def test_what_is_no_list_of_jobs_means_that_ray_is_away(answer):
    with pytest.raises(RayUnavailable):
        jobs(lambda _: answer).statuses()


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), httpx.RemoteProtocolError("what")]
)
def test_a_connection_that_fails_means_that_ray_is_away(error):
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    for call in (
        lambda it: it.statuses(),
        lambda it: it.submit(SUBMISSION),
        lambda it: it.kill("a"),
        lambda it: it.delete("a"),
    ):
        with pytest.raises(RayUnavailable, match="does not answer at http://ray:8265"):
            call(jobs(answer))


def test_what_is_gone_needs_no_kill_and_no_delete():
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(f"{request.method} {request.url.path}")
        return httpx.Response(404, text="Job does not exist")

    jobs(answer).kill("a-1")
    jobs(answer).delete("a-1")
    assert paths == ["POST /api/jobs/a-1/stop", "DELETE /api/jobs/a-1"]


def test_a_job_under_way_cannot_be_deleted():
    with pytest.raises(RayUnavailable, match="non-terminal"):
        jobs(lambda _: httpx.Response(500, text="RuntimeError: it is in a non-terminal state RUNNING.")).delete("a-1")


def test_the_token_is_found_where_ray_finds_it(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert auth_headers() == {}
    default, named, ours = tmp_path / ".ray" / "auth_token", tmp_path / "named", tmp_path / "ours"
    default.parent.mkdir()
    default.write_text("default\n")
    named.write_text("named")
    ours.write_text("ours")
    assert auth_headers() == {"Authorization": "Bearer default"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(named))
    assert auth_headers() == {"Authorization": "Bearer named"}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "plain")
    assert auth_headers() == {"Authorization": "Bearer plain"}
    assert auth_headers(ours) == {"Authorization": "Bearer ours"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert auth_headers() == {}
    assert auth_headers(ours) == {"Authorization": "Bearer ours"}
