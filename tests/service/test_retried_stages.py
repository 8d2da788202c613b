"""A retry takes finished stages from other runs of its owner: same bits, a smaller bill, files that count once."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from api_client import Service, service
from reconciling import Scene
from s3_standin import s3_server
from small_run import DOMAINS, OneCorpus, small_config

from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.core.store.locations import CACHE, is_uri
from moedisco_ray.execution import pipeline
from service.background.housekeeping import Housekeeping
from service.database import ingest, policies, reuse, runs, tokens
from service.domain.policies import Policy, Retention
from service.domain.states import RunState

ROOT = Path(str(DOMAINS["email"].__file__)).parents[1]
FIRST = ["corpus", "seed", "cluster", "decompose", "submodels", "merge"]
LAST = ["finetune", "evaluate", "export"]
FASTER = {"finetune.optimizer.lr": 2e-3}


@dataclasses.dataclass
class Place:
    """A service whose drivers run in this process."""

    api: Service
    scene: Scene

    def drive(self, run_id: str) -> list[Event]:
        """Start a run's driver as Ray would, and report what it does."""
        self.scene.round()
        job = self.scene.job(run_id)
        asked, events = self.api.jobs.submissions[job], []
        pipeline.run(
            stored_config(json.loads(asked.config_path.read_text())),
            (events.append,),
            backend=OneCorpus(),
            given_id=run_id,
            reuses=[each if is_uri(each) else Path(each) for each in asked.reuses],
            lenient=True,
        )
        self.tell(run_id, *events)
        self.api.jobs.ends(job)
        self.scene.round(2)
        assert self.scene.run(run_id).state == "succeeded"
        return events

    def tell(self, run_id: str, *events: Event) -> None:
        """Events of a driver arrive."""
        with self.api.database.write() as session:
            run = runs.lock(session, run_id)
            assert run is not None
            ingest.take(session, run, run.next_seq, events, self.scene.now)

    def pretend(self, who: str, *stages: str, **settings: Any) -> str:
        """A run that has failed after some stages, without files."""
        run_id = str(self.api.submit(who, **settings)["id"])
        self.api.start(run_id)
        self.tell(run_id, *(Event("stage_finished", stage, data={"seconds": 1.0}) for stage in stages))
        self.api.bring(run_id, RunState.FAILED)
        return run_id

    def retry(self, run_id: str, who: str = "ann", **asked: Any) -> str:
        answer = self.api.client(who).post(f"/v1/runs/{run_id}/retry", json=asked)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def estimate(self, run_id: str, who: str = "ann", **asked: Any) -> dict[str, Any]:
        answer = self.api.client(who).post(f"/v1/runs/{run_id}/retry/estimate", json=asked)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def show(self, run_id: str, who: str = "ann") -> dict[str, Any]:
        return dict(self.api.client(who).get(f"/v1/runs/{run_id}").json())

    def offered(self, run_id: str) -> list[str]:
        """Ids of the runs that a driver may take stages from."""
        with self.api.database.read() as session:
            return [Path(each).parent.name for each in reuse.locations(session, run_id)]

    def home(self, run_id: str) -> Path:
        return self.scene.place(run_id).home

    def tidy(self, later: float = 0.0) -> None:
        self.scene.now += 10 + later
        roots, idle = self.api.settings.roots, self.api.settings.session_idle_seconds
        Housekeeping(self.api.database, self.api.jobs, roots, idle).round(self.scene.now)

    @property
    def used(self) -> int:
        """Ann's bytes, as her quota shows them."""
        return int(self.api.ann.get("/v1/quota").json()["disk_bytes"]["used"])


@pytest.fixture
def place(api: Service, tmp_path: Path) -> Place:
    return Place(api, Scene(api.database, tmp_path, api.settings, api.jobs, api.pools, now=time.time()))


@pytest.fixture
def driving(tmp_path: Path) -> Iterator[Place]:
    """A service that reads the standard library."""
    with service(tmp_path, input_roots=(str(ROOT),)) as api:
        yield Place(api, Scene(api.database, tmp_path, api.settings, api.jobs, api.pools, now=time.time()))


def settings_of(name: str) -> dict[str, Any]:
    config = small_config(Path("runs"), name=name, tokens={"total": 40_000, "finetune_share": 0.4})
    return config.model_dump(mode="json", exclude_unset=True, exclude={"output"})


def on_disk(*homes: Path) -> int:
    """Bytes of all files below some folders, each file once, as `du` counts them."""
    files = {}
    for home in homes:
        for path in home.rglob("*"):
            state = path.lstat()
            if path.is_file():
                files[state.st_dev, state.st_ino] = state.st_size
    return sum(files.values())


def contents(home: Path) -> dict[str, tuple[str, str]]:
    """Fingerprint and checksum of what each stage made; the export has a card with the name and figures of the run."""
    found = {stage.name: read_manifest(next(home.glob(f"*/{stage.directory}"))) for stage in STAGES[:-2]}
    return {name: (manifest.fingerprint, manifest.content) for name, manifest in found.items() if manifest is not None}


def weights(home: Path) -> bytes:
    return next(home.glob("*/model/model.safetensors")).read_bytes()


@pytest.mark.slow
def test_text_that_was_uploaded_twice_is_one_text(driving: Place) -> None:
    """The stages of a run are taken where its text is read again under another name and by another reference."""
    asked = settings_of("base")
    for source, module in zip(asked["corpus"]["sources"], DOMAINS.values(), strict=True):
        folder = Path(str(module.__file__)).parent
        files = {path.name: path.read_bytes() for path in folder.glob("*.py")}
        for name in (source["name"], f"{source['name']}-again"):
            driving.api.upload(name, files)
        source["path"] = f"dataset://{source['name']}"
    base = str(driving.api.submit(**asked)["id"])
    driving.drive(base)
    renamed = {
        f"corpus.sources.{number}.path": f"dataset://{source['name']}-again"
        for number, source in enumerate(asked["corpus"]["sources"])
    }
    again = driving.retry(base, changes=FASTER | renamed)
    events = driving.drive(again)
    assert [event.stage for event in events if event.type == "stage_started"] == LAST
    shown = driving.show(again)
    assert [each["stages"] for each in shown["reuses"]] == [FIRST]
    assert all("-again@sha256:" in source["path"] for source in shown["config"]["corpus"]["sources"])


@pytest.mark.slow
def test_a_changed_fine_tune_costs_the_fine_tune_alone_and_the_files_count_once(driving: Place) -> None:
    """A life of three runs: the first, a retry that takes its stages, and one that makes all of them."""
    base = str(driving.api.submit(**settings_of("base"))["id"])
    driving.drive(base)
    foretold = driving.estimate(base, changes=FASTER)
    assert foretold["reuses"] == [{"run": base, "name": "base", "stages": FIRST}]
    assert foretold["reuse_in_words"].startswith(f"reuses {', '.join(FIRST)} of base: ")
    assert driving.estimate(base, changes=FASTER, reuse="never")["reuses"] == []

    again = driving.retry(base, changes=FASTER)
    events = driving.drive(again)
    assert [event.stage for event in events if event.type == "stage_started"] == LAST
    shown = driving.show(again)
    assert shown["reuses"] == foretold["reuses"]
    planned = shown["money"]["estimate_dollars"]
    assert planned == pytest.approx(foretold["dollars_with_reuse"])
    assert planned < shown["estimate"]["dollars"]
    listed = {run["id"]: run["money"]["estimate_dollars"] for run in driving.api.ann.get("/v1/runs").json()["items"]}
    assert listed == {base: shown["estimate"]["dollars"], again: planned}
    paid = {line["stage"] for line in shown["bill"]["lines"]}
    assert paid <= set(LAST)
    assert "finetune" in paid
    assert paid == {line["stage"] for line in foretold["bill"]["lines"]} - set(FIRST)
    assert "reuses" not in driving.api.ann.get("/v1/runs").json()["items"][0]

    full = driving.retry(base, changes=FASTER, reuse="never")
    driving.drive(full)
    assert driving.show(full)["reuses"] == []
    assert contents(driving.home(again)) == contents(driving.home(full))
    assert weights(driving.home(again)) == weights(driving.home(full)) != weights(driving.home(base))

    homes = [driving.home(each) for each in (base, again, full)]
    driving.tidy()
    whole = on_disk(*homes)
    assert driving.used == whole < sum(on_disk(home) for home in homes)
    assert driving.show(base)["disk_bytes"] == on_disk(homes[0])
    assert sum(driving.show(each)["disk_bytes"] for each in (base, again, full)) == whole

    # Retention takes the first run; what the second has of it stays, and counts for the second from then on.
    with driving.api.database.write() as session:
        policies.put(session, "ann", Policy(retention=Retention(finished_runs=2)), driving.scene.now)
    driving.tidy()
    driving.tidy(later=2 * 86_400)
    assert driving.api.ann.get(f"/v1/runs/{base}").status_code == 404
    assert driving.used == on_disk(*homes) == on_disk(*homes[1:])
    assert driving.show(again)["disk_bytes"] == on_disk(homes[1])
    assert contents(homes[1]) == contents(homes[2])
    assert driving.show(again)["reuses"] == [{"run": base, "name": None, "stages": FIRST}]

    # The only run that is left has all stages of its own.
    last = driving.retry(again, reuse="parent")
    assert driving.api.ann.delete(f"/v1/runs/{again}").status_code == 204
    events = driving.drive(last)
    warnings = [event.data["message"] for event in events if event.type == "warning"]
    assert [each for each in warnings if each.startswith("1 of the runs to reuse cannot be read")]
    assert [event.stage for event in events if event.type == "stage_started"] == [*FIRST, *LAST]
    assert weights(driving.home(last)) == weights(homes[2])


def objects(run_id: str = "") -> dict[str, int]:
    """Sizes of the objects of a run, or of all runs, in the bucket (bytes)."""
    bucket = boto3.resource("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).Bucket("runs")
    return {each.key: each.size for each in bucket.objects.filter(Prefix=f"team/{run_id}")}


def exported(place: Place, run_id: str) -> bytes:
    """Weights of a run's model, read through the service."""
    return place.api.ann.get(f"/v1/runs/{run_id}/artifacts/model/model.safetensors").raise_for_status().content


@pytest.fixture
def in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A service whose runs are at an S3 server."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    with s3_server("runs"), service(tmp_path, input_roots=(str(ROOT),), output_roots=("s3://runs/team",)) as api:
        yield Place(api, Scene(api.database, tmp_path, api.settings, api.jobs, api.pools, now=time.time()))


@pytest.mark.slow
def test_at_a_uri_a_changed_fine_tune_costs_the_fine_tune_alone(
    in_a_bucket: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages are copied there: each run is whole, and the owner's bytes are those in the bucket."""
    place = in_a_bucket
    base = str(place.api.submit(**settings_of("base"))["id"])
    place.drive(base)
    again = place.retry(base, changes=FASTER)
    events = place.drive(again)
    assert [event.stage for event in events if event.type == "stage_started"] == LAST
    shown = place.show(again)
    assert [(each["run"], each["stages"]) for each in shown["reuses"]] == [(base, FIRST)]
    assert {line["stage"] for line in shown["bill"]["lines"]} <= set(LAST)

    # On another machine, with an object missing, the driver makes that stage and what depends on it: the same bits.
    gone = next(key for key in objects(base) if "/objects/seed-" in key and key.endswith(".safetensors"))
    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).delete_object(Bucket="runs", Key=gone)
    damaged = place.retry(base, changes=FASTER, reuse="parent")
    monkeypatch.setenv(CACHE, str(tmp_path / "another machine"))
    events = place.drive(damaged)
    assert [event.stage for event in events if event.type == "stage_started"] == [*FIRST[1:], *LAST]
    warnings = [event.data["message"] for event in events if event.type == "warning"]
    assert "stage seed of a run to reuse is damaged or was deleted, so it is made again" in warnings
    assert place.show(damaged)["reuses"] == [{"run": base, "name": "base", "stages": ["corpus"]}]

    runs_now = (base, again, damaged)
    place.tidy()
    stored = sum(objects().values()) + on_disk(*map(place.home, runs_now))
    assert place.used == sum(place.show(each)["disk_bytes"] for each in runs_now) == stored

    assert place.api.ann.delete(f"/v1/runs/{base}").status_code == 204
    assert not objects(base)
    full = place.retry(again, reuse="never")
    place.drive(full)
    assert exported(place, again) == exported(place, damaged) == exported(place, full)
    assert place.show(full)["reuses"] == []


def test_runs_of_others_are_neither_offered_nor_named(place: Place) -> None:
    mine, other = place.pretend("ann", "corpus", "seed"), place.pretend("bob", *FIRST, *LAST)
    again = place.retry(mine, changes=FASTER)
    assert place.offered(again) == [mine]
    assert other not in json.dumps(place.estimate(mine))
    refused = place.api.bob.post(f"/v1/runs/{mine}/retry/estimate", json={})
    assert refused.status_code == 404
    unknown = place.api.bob.post("/v1/runs/01M87KCP88DHR1ACAYZM4TS1P7/retry/estimate", json={})
    assert refused.json()["detail"] == unknown.json()["detail"]

    # An administrator's retry stays in the owner's project, and takes from the owner's runs.
    lent = place.retry(other, "admin")
    place.api.start(lent)
    place.tell(lent, Event("stage_skipped", "corpus", data={"run": "demo", "offer": 0}))
    assert place.offered(lent) == [other]
    assert place.show(lent, "admin")["reuses"] == [{"run": other, "name": "demo", "stages": ["corpus"]}]
    with place.api.database.write() as session:
        plain, _ = tokens.create(session, name="x", owner="root", scopes=["read"], expires=None, now=time.time())
    place.api.plain["lesser"] = plain
    assert place.api.client("lesser").get(f"/v1/runs/{lent}").status_code == 404


def test_the_runs_that_agree_longest_are_offered_first(place: Place) -> None:
    parent, longer = place.pretend("ann", "corpus", "seed"), place.pretend("ann", *FIRST)
    place.pretend("ann", *FIRST, *LAST, seed=1)
    place.pretend("ann", "seed", "cluster")  # its corpus is gone
    place.pretend("ann", "corpus", "seed", clusters={"count": 2})
    newest = place.pretend("ann", "corpus", "seed", model={"config": {"num_experts": 8}})
    for asked, offered in ({}, [longer, parent, newest]), ({"reuse": "parent"}, [parent]), ({"reuse": "never"}, []):
        again = place.retry(parent, changes=FASTER, **asked)
        assert place.offered(again) == offered
    assert place.estimate(parent)["reuses"][0]["stages"] == FIRST
    assert place.estimate(parent, changes={"seed": 2})["reuse_in_words"].startswith("reuses no stage: ")
    refused = place.api.ann.post(f"/v1/runs/{parent}/retry", json={"reuse": "all"})
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "reuse")


def test_shared_files_count_for_the_oldest_run_that_has_them(place: Place) -> None:
    base, other = place.pretend("ann", "corpus"), place.pretend("bob", "corpus")
    text, model = (place.api.directory(base) / name for name in ("corpus/text", "model/weights"))
    for path, size in ((text, 1000), (model, 500), (model.parent.parent / "finetuned" / "weights", 0)):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(model, path) if size == 0 else path.write_bytes(b"x" * size)
    place.tidy()
    assert (place.used, place.show(base)["disk_bytes"]) == (1500, 1500)

    takers = [place.retry(base), place.retry(base)]
    for run in (*takers, other):
        (place.api.directory(run) / "corpus").mkdir(exist_ok=True)
        os.link(text, place.api.directory(run) / "corpus" / "text")
        (place.api.directory(run) / "report.json").write_bytes(b"x" * 10)
    for run in takers:
        place.api.start(run)
        place.tell(run, Event("stage_skipped", "corpus", data={"run": "demo", "offer": 0}))
        place.api.bring(run, RunState.FAILED)
    with place.api.database.write() as session:
        runs.amend(session, runs.lock(session, other), now=place.scene.now, ended=place.scene.now + 1)
    place.tidy()
    assert place.used == 1520
    assert [place.show(run)["disk_bytes"] for run in (base, *takers)] == [1500, 10, 10]
    assert place.show(other, "bob")["disk_bytes"] == 1010
    assert [run["disk_bytes"] for run in place.api.ann.get("/v1/runs").json()["items"]] == [10, 10, 1500]

    assert place.api.ann.delete(f"/v1/runs/{base}").status_code == 204
    assert place.used == 1020
    assert [place.show(run)["disk_bytes"] for run in takers] == [1010, 10]
    assert place.api.ann.delete(f"/v1/runs/{takers[0]}").status_code == 204
    assert (place.used, place.show(takers[1])["disk_bytes"]) == (1010, 1010)
