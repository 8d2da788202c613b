"""By default, a token that may only submit runs cannot read files of the host, of the service, or of other runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from api_client import Service, demo, service
from corpus_sources import documents_of
from hostile_places import SECRET, put

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.store.read_roots import reading_within
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.readers import plan_units
from moedisco_ray.stages.corpus.sources import expand_sources
from moedisco_ray.stages.text.cutting import Limits
from service.background.reconciler import Reconciler
from service.domain.states import RunState
from service.settings import Settings

SECRETS = (".ssh/id_rsa", ".aws/credentials", ".config/moedisco/service.json", ".env")
FIELDS = {
    "corpus.sources.0.path": {"corpus": {"sources": [{"format": "text"}]}},
    "evaluation.sources.0.path": {"evaluation": {"sources": [{"format": "text"}]}},
    "evaluation.lm_eval.0": {},
    "tokenizer.path": {},
    "model.init.upcycle": {},
    "model.init.checkpoint": {"tokens": {"seed_share": 0}},
}
"""The settings from which a run reads local files, with what else they need."""
STATE = Path(".local/state/moedisco")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home directory with secrets and a public text."""
    made = tmp_path / "home"
    for name in SECRETS:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(f"{SECRET} of {name}")
    (made / "notes.txt").write_text("public")
    return made


@contextlib.contextmanager
def serving(home: Path) -> Iterator[httpx.Client]:
    """A client with a submit token, of a `moedisco serve` in a home directory with default options but port and Ray."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MOEDISCO_", "XDG_"))
    }
    command = [sys.executable, "-m", "service", "serve", "--port=0", "--ray-address=http://127.0.0.1:9"]
    with (home.parent / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment | {"HOME": str(home)}, cwd=home, stdout=log, stderr=log)
    try:
        pid_file = home / STATE / "service.pid"
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and len(pid_file.read_text().splitlines()) == 2):
            assert process.poll() is None, (home.parent / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        url, admin = pid_file.read_text().splitlines()[1], (home / STATE / "admin-token").read_text().strip()
        with httpx.Client(base_url=url) as client:
            asked = {"name": "ann", "owner": "ann", "scopes": ["submit"]}
            made = client.post("/v1/tokens", json=asked, headers={"Authorization": f"Bearer {admin}"})
            client.headers["Authorization"] = f"Bearer {made.json()['token']}"
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def asking(field: str, value: str) -> dict[str, Any]:
    raw = json.loads(json.dumps(demo() | FIELDS[field]))
    put(raw, field.split("."), value)
    return raw


@pytest.mark.slow
def test_a_submit_token_reads_nothing_of_the_host_of_a_plain_serve(home: Path) -> None:
    """Before (af276e38): POST /v1/runs with {path: .local/state/moedisco/admin-token, format: text} answered 201."""
    with serving(home) as tenant:
        names = (f"{STATE}/admin-token", f"{STATE}/secret", *SECRETS, "notes.txt", ".", "*", str(home / ".ssh/id_rsa"))
        asked = [("/v1/runs", field, name) for field in FIELDS for name in names]
        for endpoint, field, name in [*asked, *(("/v1/estimates", field, names[0]) for field in FIELDS)]:
            answer = tenant.post(endpoint, json={"config": asking(field, name)})
            assert answer.status_code == 422, (field, name, answer.text)
            [mistake] = answer.json()["errors"]
            assert (mistake["field"], SECRET in answer.text) == (f"config.{field}", False)
            assert "moedisco serve --input-root DIR" in mistake["message"]
        assert tenant.post("/v1/runs", json={"config": demo()}).status_code == 201, "the embedded text needs no root"


@contextlib.contextmanager
def rooted_at(home: Path) -> Iterator[Service]:
    """A service whose input root is a home directory, which also holds its state, its token, runs and checkpoints."""
    for path in (
        home / STATE / "admin-token",
        home / "token.txt",
        home / "checkpoints" / "x.txt",
        home / "runs" / "x.txt",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SECRET)
    with service(
        home,
        input_roots=(str(home),),
        state_dir=home / STATE,
        storage_roots=(str(home / "checkpoints"),),
        admin_token_file=home / "token.txt",
    ) as api:
        yield api


HIDDEN = (
    str(STATE),
    f"{STATE}/admin-token",
    *SECRETS,
    ".*/*",
    "[.]ssh/*",
    "?ssh/*",
    "?env",
    "[.]*",
    "*/id_rsa",
    "data/../.env",
    "%2essh/id_rsa",
    "keys/id_rsa",
    "keys",
    "keys/*",
    "k*/*",
    "state/admin-token",
    "state/*",
    "st*/admin-token",
    "env.txt",
    "e*.txt",
    "runs",
    "r*/*",
    "checkpoints/*",
    "token.txt",
    "t*.txt",
    ".",
)


def test_below_a_home_directory_nothing_hidden_and_nothing_of_the_service_is_read(home: Path) -> None:
    """Before (af276e38): 19 of 29 places, such as .ssh/id_rsa and state/*, were accepted and given to the driver."""
    (home / "keys").symlink_to(".ssh")
    (home / "state").symlink_to(STATE)
    (home / "env.txt").symlink_to(".env")
    with rooted_at(home) as api:
        for name in HIDDEN:
            assert not texts(api, "ann", name), name


def test_below_a_home_directory_visible_text_is_read(home: Path) -> None:
    """Before (af276e38): `.` and `**/*` also gave what is in runs, checkpoints and token.txt."""
    with rooted_at(home) as api:
        for name in (".", "*", "**/*", "no*"):
            assert texts(api, "ann", name) == {"public"}, name


@pytest.fixture(params=["by default", "of the whole directory"])
def two_tenants(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service in whose working directory the runs lie, without an input root, or with this directory as one."""
    monkeypatch.chdir(tmp_path)
    default = Settings.model_fields["input_roots"].default
    roots = {"input_roots": default if request.param == "by default" else (str(tmp_path),)}
    with service(tmp_path, **roots) as api:
        yield api


@pytest.mark.parametrize("owner", ["bob", pytest.param("ann", marks=pytest.mark.slow)])
def test_neither_of_two_tenants_reads_runs_by_paths_or_globs(two_tenants: Service, tmp_path: Path, owner: str) -> None:
    """Before (af276e38): ann's corpus contained bob's documents by the first place, runs/*/*/corpus/train/*.parquet."""
    api = two_tenants
    run_id = finished(api, owner)
    directory = api.directory(run_id)
    (tmp_path / "link").symlink_to("runs")
    for name in (
        "runs/*/*/corpus/train/*.parquet",
        f"runs/{run_id}/*/corpus/*/*.parquet",
        str(directory / "corpus" / "train"),
        "runs",
        "r*/*/*/corpus/train/*.parquet",
        "[r]uns/**/*.parquet",
        "link/*/*/corpus/*/*.parquet",
        "l*/*/*/corpus/*/*.parquet",
        "**/*.parquet",
        ".",
    ):
        assert not texts(api, "ann", name, form="auto"), name


def test_anothers_run_answers_as_one_that_does_not_exist(two_tenants: Service) -> None:
    run_id = finished(two_tenants, "bob")
    answers = []
    for named in (run_id, "0" * 26):
        answer = two_tenants.ann.post(
            "/v1/runs", json={"config": asking("corpus.sources.0.path", f"run://{named}/corpus")}
        )
        answers.append((answer.status_code, answer.json()["errors"][0]["message"].replace(named, "RUN")))
    assert answers[0] == answers[1]
    assert answers[0][0] == 422
    own = finished(two_tenants, "ann")
    assert texts(two_tenants, "ann", f"run://{own}/corpus", form="auto") == {"of ann"}


def finished(api: Service, who: str) -> str:
    """A run that has succeeded, with a corpus."""
    run_id: str = api.submit(who)["id"]
    api.bring(run_id, RunState.STARTING, RunState.RUNNING, RunState.SUCCEEDED)
    folder = api.directory(run_id) / "corpus" / "train"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"text": [f"of {who}"]}), folder / "part-00000.parquet")
    return run_id


def texts(api: Service, who: str, place: str, form: str = "text") -> set[str]:
    """What the driver of a tenant's run reads as its corpus; nothing if the service or the driver refuses the place."""
    config = demo(corpus={"sources": [{"path": place, "format": form, "documents": "file"}]})
    answer = api.client(who).post("/v1/runs", json={"config": config})
    assert answer.status_code in (201, 422), answer.text
    if answer.status_code == 422:
        return set()
    Reconciler(api.database, api.jobs, api.pools, api.notifier, settings=api.settings, secret=b"secret").round(1.0)
    submission = api.jobs.submissions[f"{answer.json()['id']}-1"]
    api.bring(answer.json()["id"], RunState.FAILED)  # it makes room for the next run
    sources = check_config(json.loads(submission.config_path.read_text())).corpus.sources
    with reading_within(submission.read_roots):
        try:
            inputs = expand_sources(sources, Path("unused"), Limits(1024, 8192))
            units = plan_units([(each, list_files(each.field, each.settings).files) for each in inputs])
            return {document.text.strip() for unit in units for document in documents_of(unit)}
        except UserError:
            return set()
