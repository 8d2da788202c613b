import contextlib
import io
import json
import os
import tarfile
import tracemalloc

import pytest
import run_example
from api_client import service

from service.api import logs
from service.api.files import open_file
from service.domain.states import RunState
from service.errors import NotFound
from service.run_storage import DirectoryRun, read

DATA = bytes(range(256)) * 8


@pytest.fixture
def database_url(tmp_path):
    """Files are read in the same way whatever the kind of database."""
    return f"sqlite:///{tmp_path / 'service.sqlite3'}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with service(tmp_path_factory.mktemp("shared")) as made:
        yield made


@pytest.fixture
def run(api):
    return api.submit()["id"]


def fill(place):
    (place / "model").mkdir()
    (place / "model" / "model.safetensors").write_bytes(DATA)
    (place / "model" / "config.json").write_text("{}")
    (place / ".draft").mkdir()
    (place / ".draft" / "x").write_text("x")
    (place / "corpus").mkdir()
    (place / "corpus" / ".x.draft").write_text("x")
    (place / "events.jsonl").write_text("")
    (place.parent / "request.json").write_text("{}")
    (place.parent.parent / "secret").write_text("secret")
    (place / "link").symlink_to(place.parent.parent / "secret")
    (place / "folder-link").symlink_to("/etc")
    (place / "dangling").symlink_to("nowhere")
    os.mkfifo(place / "pipe")


@pytest.fixture
def directory(api, run):
    place = api.directory(run)
    fill(place)
    return place


@pytest.fixture(scope="module")
def filled(shared):
    """A service and the id of a run with files, to be read."""
    run = shared.submit()["id"]
    fill(shared.directory(run))
    return shared, run


def ask(api, run, path, method="GET", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.ann.request(method, f"/v1/runs/{run}/{path}", headers=named)


def test_artifacts_are_files_of_the_run_without_drafts_and_links(filled):
    items = ask(*filled, "artifacts").json()["items"]
    assert [item["path"] for item in items] == ["events.jsonl", "model/config.json", "model/model.safetensors"]
    assert items[2]["bytes"] == len(DATA)


def test_a_run_without_a_directory_has_no_artifacts(api, run):
    assert ask(api, run, "artifacts").json() == {"items": []}
    assert ask(api, run, "artifacts/x").status_code == 404


def test_a_file_is_a_download(filled):
    answer = ask(*filled, "artifacts/model/model.safetensors")
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["content-disposition"].startswith('attachment; filename="model.safetensors"')
    assert answer.headers["accept-ranges"] == "bytes"


def test_head_brings_the_headers_alone(filled):
    answer = ask(*filled, "artifacts/model/model.safetensors", "HEAD")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", str(len(DATA)))


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=2000-", 2000, 2048),
        ("bytes=-48", 2000, 2048),
        ("bytes=0-99999", 0, 2048),
        ("bytes=-99999", 0, 2048),
        ("bytes= 5 - 6", 5, 7),
    ],
)
def test_a_range_is_a_part(filled, asked, start, end):
    answer = ask(*filled, "artifacts/model/model.safetensors", Range=asked)
    assert (answer.status_code, answer.content) == (206, DATA[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"


@pytest.mark.parametrize("asked", ["bytes=2048-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_behind_the_end_cannot_be_had(filled, asked):
    answer = ask(*filled, "artifacts/model/model.safetensors", Range=asked)
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


@pytest.mark.parametrize(
    "asked", ["bytes=5-1", "bytes=-", "bytes=0-1,3-4", "lines=1-2", "bytes=a-b", "bytes=" + "9" * 40 + "-"]
)
def test_a_range_that_is_none_brings_everything(filled, asked):
    answer = ask(*filled, "artifacts/model/model.safetensors", Range=asked)
    assert (answer.status_code, answer.content) == (200, DATA)


def test_a_download_resumes_only_with_the_same_file(api, run, directory):
    etag = ask(api, run, "artifacts/model/model.safetensors").headers["etag"]
    assert ask(api, run, "artifacts/model/model.safetensors", Range="bytes=9-", If_Range=etag).status_code == 206
    assert ask(api, run, "artifacts/model/model.safetensors", Range="bytes=9-", If_Range='"other"').status_code == 200
    assert ask(api, run, "artifacts/model/model.safetensors", If_None_Match=etag).status_code == 304
    (directory / "model" / "model.safetensors").write_bytes(DATA[::-1])
    assert ask(api, run, "artifacts/model/model.safetensors", If_None_Match=etag).status_code == 200


def test_an_empty_file_is_a_file(filled):
    answer = ask(*filled, "artifacts/events.jsonl")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")


@pytest.mark.parametrize(
    "path",
    [
        "../request.json",
        "%2e%2e/request.json",
        "..%2frequest.json",
        "model/../../request.json",
        "model/%2e%2e/%2e%2e/request.json",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "link",
        "folder-link/passwd",
        "dangling",
        "pipe",
        "model",
        "model/",
        "",
        ".",
        ".draft/x",
        "corpus/.x.draft",
        "model//config.json",
        "model/config.json%00",
        "%00",
        "model/config.json/x",
        "x" * 3000,
        "model%5c..%5cx",
        "%ff",
    ],
)
def test_no_path_leads_out_of_the_run(filled, path):
    for method in ("GET", "HEAD"):
        answer = ask(*filled, f"artifacts/{path}", method)
        # What a client normalises itself ends at another route.
        assert answer.status_code in (404, 405) or (path == "." and answer.json()["items"])
        assert b"secret" not in answer.content


def test_open_file_itself_refuses_what_a_server_would_normalise(directory):
    for path in (
        "../request.json",
        "model/../../request.json",
        "/etc/passwd",
        "",
        ".",
        "a/",
        "link",
        "folder-link/passwd",
    ):
        with pytest.raises(NotFound):
            open_file(DirectoryRun(directory), path)


def test_the_model_is_one_archive(filled):
    answer = ask(*filled, "model.tar")
    assert answer.headers["content-length"] == str(len(answer.content))
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        assert archive.getnames() == ["demo/config.json", "demo/model.safetensors"]
        assert archive.extractfile("demo/model.safetensors").read() == DATA


def test_a_part_of_the_archive_is_that_part_of_the_whole(api, run, directory):
    (directory / "model" / "odd").write_bytes(b"x" * 513)
    (directory / "model" / "empty").write_bytes(b"")
    whole = ask(api, run, "model.tar")
    assert ask(api, run, "model.tar").content == whole.content
    size = len(whole.content)
    bounds = [0, 1, 511, 512, 513, 1023, 1024, 1025, size // 2, size - 1024, size - 1, size]
    for start in bounds[:-1]:
        for end in [end for end in bounds if end > start]:
            part = ask(api, run, "model.tar", Range=f"bytes={start}-{end - 1}")
            assert (part.status_code, part.content) == (206, whole.content[start:end]), (start, end)
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    assert ask(api, run, "model.tar", Range=f"bytes={size}-").status_code == 416


def test_an_archive_is_resumed_only_while_it_is_the_same(api, run, directory):
    first = ask(api, run, "model.tar")
    etag = first.headers["etag"]
    assert ask(api, run, "model.tar", **{"If-None-Match": etag}).status_code == 304
    assert ask(api, run, "model.tar", Range="bytes=5-", **{"If-Range": etag}).status_code == 206
    (directory / "model" / "config.json").write_text('{"other": 1}')
    changed = ask(api, run, "model.tar", Range="bytes=5-", **{"If-Range": etag})
    assert (changed.status_code, changed.headers["etag"] != etag) == (200, True)
    head = api.ann.head(f"/v1/runs/{run}/model.tar")
    assert (head.headers["etag"], head.headers["content-length"]) == (
        changed.headers["etag"],
        str(len(changed.content)),
    )
    assert head.headers["content-type"] == "application/x-tar"


def test_a_new_name_of_the_run_does_not_reach_the_archive(filled):
    api, run = filled
    before = ask(api, run, "model.tar")
    assert api.ann.patch(f"/v1/runs/{run}", json={"name": "../../../tmp/x"}).status_code == 200
    after = ask(api, run, "model.tar")
    assert (after.content, after.headers["content-disposition"]) == (
        before.content,
        before.headers["content-disposition"],
    )


def test_long_and_foreign_names_survive_the_archive(api, run, directory):
    name = "ü" * 80 + ".json"
    (directory / "model" / ("d" * 120)).mkdir()
    (directory / "model" / ("d" * 120) / name).write_text("x")
    with tarfile.open(fileobj=io.BytesIO(ask(api, run, "model.tar").content)) as archive:
        assert f"demo/{'d' * 120}/{name}" in archive.getnames()


def test_a_model_that_is_not_there_yet_is_not_found(api, run):
    assert ask(api, run, "model.tar").status_code == 404


def test_logs_are_listed_and_read_from_their_end(api, run, directory):
    (directory / "logs").mkdir()
    (directory / "ray.log").write_text("".join(f"line {i}\n" for i in range(1000)))
    (directory / "logs" / "submodel-0.0.log").write_text("a\nb")
    (directory / "logs" / "evil.log").symlink_to("/etc/passwd")
    assert [item["name"] for item in ask(api, run, "logs").json()["items"]] == ["driver", "submodel-0.0"]
    answer = ask(api, run, "logs/driver?tail=2")
    assert (answer.text, answer.headers["content-type"]) == ("line 998\nline 999\n", "text/plain; charset=utf-8")
    assert ask(api, run, "logs/submodel-0.0?tail=1").text == "b"
    assert ask(api, run, "logs/submodel-0.0").text == "a\nb"
    assert ask(api, run, "logs/submodel-0.0?tail=0").text == ""
    for name in ("evil", "none", "..%2f..%2frequest", "%00", "."):
        assert ask(api, run, f"logs/{name}").status_code in (404, 200 if name == "." else 404)


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    "text", ["", "\n", "a", "a\n", "a\nb", "a\n\nb\n", "\n\n\n", "x" * 200_000 + "\ny\n" + "z" * 100_000]
)
def test_the_tail_of_a_log_is_its_last_lines(tmp_path, text, lines):
    (tmp_path / "log").write_text(text)
    with contextlib.closing(DirectoryRun(tmp_path).open("log")) as file:
        start = logs.tail_start(file, len(text), lines)
    assert text[start:] == "".join(text.splitlines(keepends=True)[-lines:] if lines else [])


def test_a_log_is_followed_until_its_run_has_ended(api, run, directory):
    (directory / "ray.log").write_text("one\n")
    api.start(run)
    with api.ann.stream("GET", f"/v1/runs/{run}/logs/driver?follow=true") as answer:
        chunks = answer.iter_text()
        assert next(chunks) == "one\n"
        with (directory / "ray.log").open("a") as file:
            file.write("two\n")
        assert next(chunks) == "two\n"
        with (directory / "ray.log").open("a") as file:
            file.write("three\n")
        api.bring(run, RunState.SUCCEEDED)
        assert "".join(chunks) == "three\n"


def test_reports_are_built_while_a_run_is_under_way(api, run, directory):
    assert ask(api, run, "report").json()["stages"] == []
    assert ask(api, run, "clusters").status_code == 404
    (directory / "clusters").mkdir()
    (directory / "clusters" / "report.json").write_text('{"silhouette": 0.5}')
    assert ask(api, run, "clusters").json() == {"silhouette": 0.5}
    report = run_example.report() | {"name": "from the file"}
    (directory / "report.json").write_text(json.dumps(report))
    api.start(run)
    api.bring(run, RunState.SUCCEEDED)
    assert ask(api, run, "report").json() == report
    (directory / "report.json").write_text('{"name": "broken"}')
    broken = ask(api, run, "report").json()
    assert (broken["stages"], broken["bill"]["dollars"]) == ([], 0)
    assert "cannot read the run's report (seed)" in broken["state_reason"]


def test_a_file_is_read_whole_without_a_copy_and_not_beyond_the_limit(tmp_path):
    size = 8 * 2**20
    (tmp_path / "log").write_bytes(bytes(size))
    tracemalloc.start()
    content = read(DirectoryRun(tmp_path), "log", size)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content == bytes(size)
    assert most < 1.5 * size
    with pytest.raises(NotFound, match="larger than 7 MiB"):
        read(DirectoryRun(tmp_path), "log", size - 1)
