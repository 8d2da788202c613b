"""Data sets: uploads in parts, contents that are stored once, people who may see them, and runs that read them."""

from __future__ import annotations

import errno
import filecmp
import functools
import hashlib
import json
import os
import random
import re
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from api_client import PlanningHere, Service, demo, service
from reconciling import Scene
from running_service import RETRY, Running
from typer.testing import CliRunner

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.errors import ConfigError, CorpusError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.read_roots import reading_within
from moedisco_ray.plan.speed import Machine
from moedisco_ray.plan.text_size import Lister, corpus_bytes
from moedisco_ray.stages.corpus.sources import input_identity
from service.background.housekeeping import Housekeeping
from service.cli import app
from service.client import Client, RequestRefused
from service.dataset_store import DatasetStore
from service.domain.datasets import DatasetFile, clash, found_in, hash_of, path_mistake, store_in
from service.domain.states import RunState
from service.errors import Conflict, InvalidRequest, StorageFull
from service.planning import task

DAY = 24 * 3600.0
TEXT = b"".join(b"line %d of a text\n" % number for number in range(200))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listed(**contents: bytes) -> list[dict[str, Any]]:
    return [
        {"path": f"{name}.txt", "bytes": len(content), "sha256": sha(content)} for name, content in contents.items()
    ]


def put(client: Any, content: bytes, start: int = 0, end: int | None = None, size: int | None = None) -> httpx.Response:
    end, size = len(content) if end is None else end, len(content) if size is None else size
    span = f"{start}-{end - 1}" if end > start else "*"
    headers = {"Content-Range": f"bytes {span}/{size}", "Content-Type": "application/octet-stream"}
    return client.put(f"/v1/blobs/{sha(content)}", content=content[start:end], headers=headers)


def stored(api: Service) -> dict[str, list[str]]:
    """Names of all files in the store, by folder."""
    root = store_in(api.settings.roots.homes[0])
    found: dict[str, list[str]] = {"uploads": [], "contents": [], "files": []}
    for path in sorted(root.rglob("*")):
        folder, _, name = path.relative_to(root).as_posix().partition("/")
        if path.is_file():
            found[folder].append(name)
    return found


def test_a_data_set_is_uploaded_in_parts_and_downloaded(api: Service) -> None:
    body = {"name": "wiki", "files": listed(a=TEXT, b=b"", c=TEXT)}
    first = api.ann.post("/v1/datasets", json=body).json()
    assert first["dataset"] is None
    assert first["missing"] == [
        {"sha256": sha(TEXT), "bytes": len(TEXT), "offset": 0},
        {"sha256": sha(b""), "bytes": 0, "offset": 0},
    ]
    assert put(api.ann, TEXT, 0, 1000).json()["offset"] == 1000
    assert api.ann.post("/v1/datasets", json=body).json()["missing"][0]["offset"] == 1000
    gap = put(api.ann, TEXT, 1001)
    assert (gap.status_code, gap.json()["detail"]) == (409, "1000 bytes of this file have arrived; continue there")
    assert put(api.ann, TEXT, 500).json()["offset"] == len(TEXT)  # bytes that have arrived may be sent again
    assert put(api.ann, b"").status_code == 200
    made = api.ann.post("/v1/datasets", json=body).json()
    assert made["missing"] == []
    dataset = made["dataset"]
    files = [DatasetFile(**file) for file in body["files"]]
    assert (dataset["bytes"], dataset["count"], dataset["hash"]) == (2 * len(TEXT), 3, hash_of(files))
    assert api.ann.post("/v1/datasets", json=body).json()["dataset"] == dataset  # the same again
    place = f"/v1/datasets/{dataset['id']}"
    assert api.ann.get(place).json()["files"] == body["files"]
    assert [each["id"] for each in api.ann.get("/v1/datasets?name=wiki").json()["items"]] == [dataset["id"]]
    assert api.ann.get("/v1/datasets?name=other").json()["items"] == []
    whole, part = (
        api.ann.get(f"{place}/files/a.txt"),
        api.ann.get(f"{place}/files/a.txt", headers={"Range": "bytes=5-9"}),
    )
    assert (whole.content, part.status_code, part.content) == (TEXT, 206, TEXT[5:10])
    assert api.ann.head(f"{place}/files/b.txt").headers["content-length"] == "0"
    for name in ("d.txt", "../../x", "%2e%2e/contents", ".hidden"):
        assert api.ann.get(f"{place}/files/{name}").status_code == 404


def test_the_same_content_is_stored_once_and_removed_with_its_last_data_set(api: Service) -> None:
    one = api.upload("one", {"a.txt": TEXT, "b.txt": b"x"})
    two = api.upload("two", {"other.txt": TEXT})
    bobs = api.upload("one", {"a.txt": TEXT, "b.txt": b"x"}, "bob")
    assert bobs["hash"] == one["hash"]
    assert stored(api) == {
        "uploads": [],
        "contents": sorted([sha(TEXT), sha(b"x")]),
        "files": sorted([f"{one['hash']}/a.txt", f"{one['hash']}/b.txt", f"{two['hash']}/other.txt"]),
    }
    numbers = {
        path.stat().st_ino
        for path in store_in(api.settings.roots.homes[0]).rglob("*")
        if path.stat().st_size == len(TEXT)
    }
    assert len(numbers) == 1
    used = api.admin.get("/v1/quota?owner=ann").json()["disk_bytes"]["used"]
    assert used == len(TEXT) + 1  # each content counts once
    assert api.ann.delete(f"/v1/datasets/{one['id']}").status_code == 204
    assert api.admin.get("/v1/quota?owner=ann").json()["disk_bytes"]["used"] == len(TEXT)
    assert api.bob.get(f"/v1/datasets/{bobs['id']}/files/b.txt").content == b"x"
    assert api.bob.delete(f"/v1/datasets/{bobs['id']}").status_code == 204
    assert stored(api)["contents"] == [sha(TEXT)]
    assert api.ann.delete(f"/v1/datasets/{two['id']}").status_code == 204
    assert stored(api) == {"uploads": [], "contents": [], "files": []}


def test_a_hash_alone_gives_no_one_the_text(api: Service) -> None:
    dataset = api.upload("wiki", {"a.txt": TEXT})
    answer = api.bob.post("/v1/datasets", json={"name": "mine", "files": listed(a=TEXT)}).json()
    assert answer == {"dataset": None, "missing": [{"sha256": sha(TEXT), "bytes": len(TEXT), "offset": 0}]}
    place = f"/v1/datasets/{dataset['id']}"
    for method, path in (("GET", place), ("GET", f"{place}/files/a.txt"), ("DELETE", place)):
        strange, absent = (api.bob.request(method, each) for each in (path, path.replace(dataset["id"], "0" * 26)))
        assert (strange.status_code, strange.json()["detail"]) == (404, absent.json()["detail"])
    assert api.bob.get("/v1/datasets").json()["items"] == []


def test_a_wrong_content_is_refused_in_one_line(api: Service) -> None:
    headers = {"Content-Range": "bytes 0-2/3"}
    answer = api.ann.put(f"/v1/blobs/{sha(b'abc')}", content=b"abd", headers=headers)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["message"].startswith("what has arrived is another content (3 bytes, ")
    assert stored(api)["uploads"] == []  # it starts anew
    for content, message in ((b"abcd", "longer than its Content-Range"), (b"ab", "shorter than its Content-Range")):
        answer = api.ann.put(f"/v1/blobs/{sha(b'abc')}", content=content, headers=headers)
        assert (answer.status_code, message in answer.json()["detail"]) == (400, True)
    for text in ("bytes 2-1/3", "bytes 0-3/3", "bytes 0-2/*", "0-2/3", f"bytes 0-{2**60}/{2**60 + 1}"):
        assert api.ann.put(f"/v1/blobs/{sha(b'abc')}", headers={"Content-Range": text}).status_code == 422


@pytest.mark.parametrize(
    "path", ["../a", "/a", "a/../b", ".a", "a/.b", "a//b", "a/", "", "a\\b", "a\n", "x" * 300, "é" * 130]
)
def test_paths_that_lead_elsewhere_are_refused(path: str) -> None:
    assert path_mistake(path) is not None
    assert path_mistake("a/b c/é.txt") is None


def test_files_that_cannot_be_together_are_refused(api: Service) -> None:
    for paths in (["a", "a"], ["a", "a/b"], ["a/b/c", "a.txt", "a/b"]):
        assert clash(paths) is not None
        body = {"name": "x", "files": [{"path": path, "bytes": 1, "sha256": sha(b"x")} for path in paths]}
        assert api.ann.post("/v1/datasets", json=body).status_code == 422
    assert clash(["a.txt", "a/b", "a/c", "a-b"]) is None
    one, other = listed(a=TEXT)[0], listed(b=TEXT)[0] | {"bytes": 1}
    for files in ([], [one, other], [one | {"path": "../a"}]):
        assert api.ann.post("/v1/datasets", json={"name": "x", "files": files}).status_code == 422
    assert api.ann.post("/v1/datasets", json={"name": "../x", "files": [one]}).status_code == 422
    many = [one | {"path": f"{'folder' * 10}/{number}.txt"} for number in range(10_001)]
    for count, status in ((10_000, 200), (10_001, 422)):
        assert api.ann.post("/v1/datasets", json={"name": "x", "files": many[:count]}).status_code == status


def test_a_quota_limits_what_arrives(api: Service) -> None:
    policies = {"default": {}, "owners": {"ann": {"disk_bytes": 5000}}}
    assert api.admin.put("/v1/policies", json=policies).status_code in (200, 204)
    api.upload("wiki", {"a.txt": TEXT})
    more = b"y" * 2000
    refused = [api.ann.post("/v1/datasets", json={"name": "b", "files": listed(b=more)}), put(api.ann, more, 0, 10)]
    for answer in refused:
        assert answer.status_code == 403
        assert "do not fit into the 0.0 GB of disk" in answer.json()["detail"]
    assert put(api.ann, b"z" * 500).status_code == 200


def test_a_full_disk_is_one_line_and_loses_nothing(api: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert put(api.ann, TEXT, 0, 1000).status_code == 200
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
        answer = put(api.ann, TEXT, 1000)
    assert answer.status_code == 507
    assert answer.json()["detail"].startswith("the service has no room for more; what has arrived is kept")
    assert put(api.ann, TEXT, 1000).json()["offset"] == len(TEXT)


def test_housekeeping_removes_what_rests_for_a_day(api: Service) -> None:
    def tidy(later: float) -> dict[str, list[str]]:
        Housekeeping(api.database, api.jobs, api.settings.roots, DAY).round(time.time() + later)
        return stored(api)

    kept = api.upload("kept", {"a.txt": TEXT})
    half, alone, orphan = b"half" * 10, b"alone", b"orphan"
    put(api.ann, half, 0, 10)
    put(api.ann, alone)
    root = store_in(api.settings.roots.homes[0])
    (root / "contents" / sha(orphan)).write_bytes(orphan)
    (root / "files" / ("0" * 64)).mkdir()
    before = stored(api)
    assert len(before["contents"]) == 3
    assert tidy(DAY / 2) == before
    assert tidy(DAY + 60) == {"uploads": [], "contents": [sha(TEXT)], "files": [f"{kept['hash']}/a.txt"]}
    assert not (root / "files" / ("0" * 64)).exists()
    assert api.ann.get("/v1/quota").json()["disk_bytes"]["used"] == len(TEXT)


def test_no_open_request_changes_a_checked_file(tmp_path: Path) -> None:
    store = DatasetStore(tmp_path)
    store.append("ann", sha(TEXT), 0, TEXT)
    with pytest.raises(InvalidRequest):
        store.check("ann", sha(TEXT), len(TEXT) - 1)
    store.append("ann", sha(TEXT), 0, TEXT[:10])
    with pytest.raises(Conflict):
        store.check("ann", sha(TEXT), len(TEXT))
    store.append("ann", sha(TEXT), 10, TEXT[10:])
    store.check("ann", sha(TEXT), len(TEXT))
    assert store.arrived("ann", sha(TEXT)) == len(TEXT)
    store.check("ann", sha(TEXT), len(TEXT))  # the service may have ended before it was published
    store.publish("ann", sha(TEXT))
    with pytest.raises(Conflict):
        store.check("ann", sha(TEXT), len(TEXT))
    store.append("ann", sha(TEXT), 0, b"evil")
    assert (store_in(tmp_path) / "contents" / sha(TEXT)).read_bytes() == TEXT
    assert store.unfinished_bytes("ann") == 4


class Cutting(httpx.AsyncHTTPTransport):
    """Loses the connection in every `each`-th part of an upload or download, after some bytes."""

    def __init__(self, each: int, after: int) -> None:
        super().__init__()
        self.each, self.after, self.count = each, after, 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.count += request.method == "PUT" or "/files/" in request.url.path
        is_cut = request.method == "PUT" and self.count % self.each == 0
        if is_cut:
            request.stream = _Half(await request.aread(), self.after)
        answer = await super().handle_async_request(request)
        if "/files/" in request.url.path and self.count % self.each == 0:
            answer.stream = _Half(answer.stream, self.after)
        return answer


class _Half(httpx.AsyncByteStream):
    def __init__(self, content: Any, after: int) -> None:
        self.content, self.after = content, after

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content[: self.after]
            raise httpx.WriteError("cut")
        sent = 0
        async for chunk in self.content:
            yield chunk
            sent += len(chunk)
            if sent > self.after:
                raise httpx.ReadError("cut")

    async def aclose(self) -> None:
        if not isinstance(self.content, bytes):
            await self.content.aclose()


def peak_bytes() -> int:
    """Largest memory of this process, in which client and service run, since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


@pytest.mark.parametrize("size", [3 * 2**20, pytest.param(2**30, marks=pytest.mark.slow)])
def test_a_lost_connection_is_continued(tmp_path: Path, size: int) -> None:
    text = tmp_path / "docs"
    (text / "deep").mkdir(parents=True)
    (text / ".git").mkdir()
    (text / ".git" / "config").write_bytes(b"hidden")
    (text / "small.txt").write_bytes(TEXT)
    block = random.Random(0).randbytes(2**20)
    with (text / "deep" / "large.txt").open("wb") as file:
        for number in range(size >> 20):
            file.write(number.to_bytes(4, "big") + block[4:])
    with service(tmp_path) as made:
        running = Running(made)
        running.start()
        cutting = Cutting(3, 2**20)
        arrived: list[int] = []
        try:
            with Client(running.url, made.plain["ann"], retry=RETRY, transport=cutting) as client:
                client.upload_dataset(text / "small.txt")  # loads what an upload needs
                peak_bytes()
                before = peak_bytes()
                dataset = client.upload_dataset(text, progress=lambda done, _: arrived.append(done))
                assert (dataset.name, dataset.count, dataset.bytes) == ("docs", 2, size + len(TEXT))
                asked = cutting.count
                assert client.upload_dataset(text) == dataset
                assert cutting.count == asked  # nothing is sent again
                copy = client.download_dataset(dataset.id, tmp_path / "copy")
                assert peak_bytes() - before < 150e6
                assert client.upload_dataset(copy, "docs").id == dataset.id
                client.delete_dataset(dataset.id)
                with pytest.raises(RequestRefused):
                    client.dataset(dataset.id)
                assert [each.name for each in client.datasets()] == ["small.txt"]
        finally:
            running.stop()
    assert sorted(arrived) == arrived
    assert arrived[-1] == size + len(TEXT)
    assert sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*.txt")) == ["deep/large.txt", "small.txt"]
    assert filecmp.cmp(text / "deep" / "large.txt", copy / "deep" / "large.txt", shallow=False)
    for folder in (text, copy):  # pytest keeps the last ones
        shutil.rmtree(folder)


def test_disks_without_hard_links_have_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    store = DatasetStore(tmp_path)
    store.append("ann", sha(TEXT), 0, TEXT)
    store.check("ann", sha(TEXT), len(TEXT))
    store.publish("ann", sha(TEXT))
    monkeypatch.setattr(Path, "hardlink_to", refused)
    store.assemble("0" * 64, [DatasetFile("a/b.txt", len(TEXT), sha(TEXT))])
    folder = found_in([tmp_path], "0" * 64)
    assert folder is not None
    assert ((folder / "a" / "b.txt").read_bytes(), (folder / "a" / "b.txt").stat().st_mtime) == (TEXT, 0)
    monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(StorageFull):
        store.assemble("1" * 64, [DatasetFile("a", len(TEXT), sha(TEXT))])
    assert found_in([tmp_path], "1" * 64) is None


def of(path: str) -> dict[str, Any]:
    return demo(corpus={"sources": [{"path": path, "format": "text"}]})


def test_the_command_line_uploads_what_the_service_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text"
    (text / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.txt", "c.log", ".hidden.txt"):
        (text / name).write_bytes(TEXT + name.encode())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readable.txt").write_bytes(TEXT)
    sources = [
        {"path": "text", "exclude": ["deep/**"]},
        {"path": "text/**/*.txt", "format": "text"},
        {"path": "data/readable.txt"},
        {"path": "embedded"},
    ]
    asked = demo(corpus={"sources": sources}, evaluation={"sources": [{"path": "text/a.txt", "name": "a"}]})
    (tmp_path / "run.yaml").write_text(json.dumps(asked))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))

    # Parsers are made once; typer's runner makes those of all commands for each call.
    monkeypatch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))

    def ran(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, list(words), prog_name="moedisco")
        assert result.exit_code == code, result.output
        lines = (result.stdout if code == 0 else result.stderr).splitlines(keepends=True)
        return "".join(line for line in lines if "[info" not in line)  # without the service's own

    with service(tmp_path, PlanningHere()) as made:
        running = Running(made)
        running.start()
        monkeypatch.setenv("MOEDISCO_URL", running.url)
        monkeypatch.setenv("MOEDISCO_TOKEN", made.plain["ann"])
        try:
            assert "is outside of the input roots" in ran("submit", "run.yaml", "--no-upload", code=2)
            made_run = json.loads(ran("submit", "run.yaml", "--json"))
            found = json.loads(ran("datasets", "list", "--json"))
            references = [source["path"] for source in made_run["config"]["corpus"]["sources"]]
            assert references[2:] == [str(tmp_path / "data" / "readable.txt"), "embedded"]
            assert (
                made_run["config"]["evaluation"]["sources"][0]["path"] == f"dataset://a.txt@sha256:{found[0]['hash']}"
            )
            listed = {}
            for each in found:
                detail = made.ann.get(f"/v1/datasets/{each['id']}").json()
                listed[f"dataset://{each['name']}@sha256:{each['hash']}"] = [file["path"] for file in detail["files"]]
            assert [listed[each] for each in references[:2]] == [["a.txt", "c.log"], ["a.txt", "deep/b.txt"]]
            ran("submit", "run.yaml", "--upload")
            assert len(json.loads(ran("datasets", "list", "--json"))) == len(found) + 1  # also what it can read

            line = ran("datasets", "upload", "text", "--name", "all")
            reference = line.split()[1]
            assert "all" in ran("datasets", "list", "--name", "all")
            assert ran("datasets", "download", reference, "copy") == f"The data set is in {tmp_path / 'copy'}\n"
            assert (tmp_path / "copy" / "deep" / "b.txt").read_bytes() == TEXT + b"deep/b.txt"
            assert "names 2 data sets; give the id of one" in ran("datasets", "download", "text", code=2)
            assert "no such data set" in ran("datasets", "delete", "none", "--yes", code=2)
            assert ran("datasets", "delete", reference[:30], "--yes").endswith("all: deleted\n")
        finally:
            running.stop()


def test_a_plan_knows_how_much_text_a_data_set_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time of the corpus stage is known; text at other paths is not looked at during a request."""
    texts: list[int | None] = []

    def known_machine(config: RunConfig, *, here: bool, listed: Lister) -> Machine:
        texts.append(corpus_bytes(config, listed))
        return Machine()

    monkeypatch.setattr(task, "known_machine", known_machine)
    with service(tmp_path, PlanningHere()) as api:
        reference = f"dataset://wiki@sha256:{api.upload('wiki', {'a/b.txt': TEXT, 'c.txt': TEXT})['hash']}"
        (tmp_path / "data" / "a.txt").write_bytes(TEXT)
        for path in (reference, str(tmp_path / "data" / "a.txt")):
            answer = api.ann.post("/v1/estimates", json={"config": of(path)})
            assert answer.status_code == 200, answer.text
    assert texts == [2 * len(TEXT), None]


def test_a_run_reads_a_data_set_by_its_hash(api: Service, tmp_path: Path) -> None:
    old, new = (api.upload("wiki", {"a/b.txt": text}) for text in (TEXT, TEXT * 2))
    pinned = f"dataset://wiki@sha256:{old['hash']}"
    run = api.submit(**of("dataset://wiki"))
    assert run["config"]["corpus"]["sources"][0]["path"] == f"dataset://wiki@sha256:{new['hash']}"  # the newest
    asked = api.submit(**of(f"{pinned}/"))
    assert asked["config"]["corpus"]["sources"][0]["path"] == pinned

    scene = Scene(api.database, tmp_path, api.settings, api.jobs, api.pools, now=time.time())
    scene.round()
    given = api.jobs.submissions[scene.job(asked["id"])]
    config = check_config(json.loads(given.config_path.read_text()))
    folder = found_in(api.settings.roots.homes, old["hash"])
    assert config.corpus.sources[0].path == str(folder)
    with reading_within(given.read_roots):
        identity = input_identity(config)["corpus"]
    with reading_within(api.settings.roots.readable()), pytest.raises(CorpusError):
        input_identity(config)
    again = api.upload("other", {"a/b.txt": TEXT}, "bob")
    assert found_in(api.settings.roots.homes, again["hash"]) == folder
    assert input_identity(config)["corpus"] == identity

    place = f"/v1/datasets/{old['id']}"
    assert api.ann.delete(place).status_code == 204  # bob has an equal one
    refused = api.bob.delete(f"/v1/datasets/{again['id']}")
    assert refused.status_code == 409
    assert refused.json()["detail"].endswith("reads this data set and has not succeeded; delete the run first")
    api.bring(asked["id"], RunState.CANCELLED)
    assert api.ann.delete(f"/v1/runs/{asked['id']}").status_code == 204
    assert api.bob.delete(f"/v1/datasets/{again['id']}").status_code == 204
    gone = api.ann.post("/v1/runs", json={"config": of(pinned)}).json()["errors"][0]
    assert gone["field"] == "config.corpus.sources.0.path"
    assert "there is no such data set, or it is not yours; `moedisco datasets list` shows yours" in gone["message"]


def test_references_to_data_sets_of_others_and_malformed_ones_are_refused(api: Service) -> None:
    dataset = api.upload("wiki", {"a.txt": TEXT})
    strange = f"dataset://wiki@sha256:{dataset['hash']}"
    for path, message in (
        ("dataset://wiki", "there is no such data set, or it is not yours"),
        (strange, "there is no such data set, or it is not yours"),
        (f"dataset://none@sha256:{dataset['hash']}", "there is no such data set, or it is not yours"),
        ("dataset://", "must read dataset://NAME"),
        ("dataset://../wiki", "must read dataset://NAME"),
        (f"{strange}/../../contents", "must read dataset://NAME"),
        ("dataset://wiki@sha256:0", "must read dataset://NAME"),
        ("dataset://wiki/*.txt", "must read dataset://NAME"),
        (str(found_in(api.settings.roots.homes, dataset["hash"])), "is outside of the input roots"),
    ):
        answer = api.bob.post("/v1/estimates", json={"config": of(path)})
        assert answer.status_code == 422
        assert message in answer.json()["errors"][0]["message"], path
    for settings in ({"tokenizer": {"path": strange}}, {"output": strange}, {"checkpoint": {"storage": strange}}):
        assert api.ann.post("/v1/runs", json={"config": demo(**settings)}).status_code == 422
    measured = demo(evaluation={"sources": [{"path": strange, "name": "w"}]})
    assert [who.post("/v1/runs", json={"config": measured}).status_code for who in (api.ann, api.bob)] == [201, 422]
    inside = demo(output=str(store_in(api.settings.roots.homes[0]) / "files" / dataset["hash"]))
    refused = api.ann.post("/v1/runs", json={"config": inside})
    assert (refused.status_code, "'.datasets' is hidden" in refused.text) == (422, True)
    with pytest.raises(ConfigError, match="cannot be looked up: the data set was deleted, or this is not a control"):
        check_config(of("dataset://wiki"))


def test_a_retry_takes_stages_of_a_run_with_equal_text_under_another_name(api: Service) -> None:
    for name in ("wiki", "copy"):
        api.upload(name, {"a.txt": TEXT})
    api.upload("longer", {"a.txt": TEXT * 2})
    run_id = api.submit(**of("dataset://wiki"))["id"]
    api.start(run_id)
    api.report(run_id, Event("stage_finished", "corpus", data={"seconds": 1.0}))
    api.bring(run_id, RunState.FAILED)
    for name, stages in (("copy", [["corpus"]]), ("longer", [])):
        changes = {"corpus.sources.0.path": f"dataset://{name}"}
        found = api.ann.post(f"/v1/runs/{run_id}/retry/estimate", json={"changes": changes}).json()["reuses"]
        assert [each["stages"] for each in found] == stages
