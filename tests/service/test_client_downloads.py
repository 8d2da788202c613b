import contextlib
import io
import re
import tarfile

import httpx
import pytest
from client_standin import PROMPT, Body, make, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.errors import RunDirError, UserError
from moedisco_ray.core.store.artifacts import commit
from service.client import DownloadError, RetryPolicy, ServiceAway, ServiceProblem
from service.client.unpacking import Unpacker, below

FILES = {
    "config.json": b"{}",
    "model-00001.safetensors": bytes(range(256)) * 40,
    "empty": b"",
    "deep/" + "long" * 40 + "/caf\u00e9.txt": b"x" * 513,
}


def archive(files, kind=tarfile.PAX_FORMAT, change=lambda member: member, top="demo/"):
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", format=kind) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(content)
            tar.addfile(change(member), io.BytesIO(content))
    return memory.getvalue()


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def unpack(directory, text, size=10_240):
    unpacker = Unpacker(directory)
    try:
        for start in range(0, len(text), size):
            unpacker.take(text[start : start + size])
    finally:
        unpacker.close()
    return unpacker


class Service:
    """Has a model; bodies break after as many bytes as `breaks` says, one after the other."""

    def __init__(self, files=FILES, breaks=(), tar=None, ranges=True):
        self.files, self.breaks, self.ranges = files, list(breaks), ranges
        self.tar = archive(files) if tar is None else tar
        self.asked = []

    def __call__(self, request):
        path = request.url.path.removeprefix("/v1/runs/x/")
        self.asked.append((path, request.headers.get("range")))
        if path == "artifacts":
            listed = {f"model/{name}": content for name, content in self.files.items()} | {"report.json": b"{}"}
            return httpx.Response(
                200,
                json={
                    "items": [{"path": name, "bytes": len(content), "updated": 1.0} for name, content in listed.items()]
                },
            )
        content = self.tar if path == "model.tar" else self.files[path.removeprefix("artifacts/model/")]
        start = int(re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", "bytes=0-"))[1])
        fresh = request.headers.get("if-range", self.version) == self.version
        if not start or not fresh or not self.ranges:
            return self.body(200, content)
        if start >= len(content):
            return problem(416, "no such bytes", headers={"Content-Range": f"bytes */{len(content)}"})
        return self.body(206, content[start:])

    version = '"v1"'

    def body(self, status, content):
        keep = self.breaks.pop(0) if self.breaks else None
        stream = Body([content] if keep is None else [content[:keep]], broken=keep is not None)
        return httpx.Response(
            status, stream=stream, headers={"ETag": self.version, "Content-Length": str(len(content))}
        )


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@settings(deadline=None)
@given(size=st.integers(1, 5000))
def test_an_archive_is_unpacked_however_it_arrives(tmp_path_factory, kind, size):
    directory = tmp_path_factory.mktemp("unpacked")
    assert unpack(directory, archive(FILES, kind), size).complete
    assert contents(directory) == FILES


def test_modes_and_owners_are_not_taken_over(tmp_path):
    def change(member):
        member.mode, member.uid, member.mtime = 0o6777, 0, 1
        return member

    unpack(tmp_path, archive({"a": b"x"}, change=change))
    assert (tmp_path / "a").stat().st_mode & 0o7111 == 0


def of_type(kind, name="evil", target="/etc/passwd"):
    def change(member):
        member.type, member.name, member.linkname = kind, name, target
        return member

    return archive({"evil": b""}, change=change)


EVIL = {
    "absolute": archive({"/tmp/evil": b"x"}, top=""),
    "parent": archive({"../evil": b"x"}),
    "parent at the top": archive({"../evil": b"x"}, top=""),
    "no top directory": archive({"evil": b"x"}, top=""),
    "parent inside": archive({"a/../../evil": b"x"}),
    "backslash": archive({"..\\evil": b"x"}),
    "long parent, pax": archive({"x" * 200 + "/../../evil": b"x"}),
    "long parent, gnu": archive({"x" * 200 + "/../../evil": b"x"}, tarfile.GNU_FORMAT),
    "parent directory": of_type(tarfile.DIRTYPE, "../evil"),
    "symbolic link": of_type(tarfile.SYMTYPE),
    "hard link": of_type(tarfile.LNKTYPE),
    "long link": of_type(tarfile.SYMTYPE, target="../" * 60),
    "device": of_type(tarfile.CHRTYPE),
    "fifo": of_type(tarfile.FIFOTYPE),
    "sparse": of_type(tarfile.GNUTYPE_SPARSE),
    "unknown": of_type(b"Z"),
}


@pytest.mark.parametrize("text", EVIL.values(), ids=EVIL)
def test_what_must_not_be_unpacked_is_refused(tmp_path, text):
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(DownloadError, match=r"evil|\.\.|inner cannot be written"):
        unpack(inner, text)
    assert not contents(tmp_path)


def test_a_name_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="File exists"):
        unpack(tmp_path, archive({"a": b"first"})[:1024] + archive({"a": b"second"}))
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_broken_archive_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="the archive is damaged"):
        unpack(tmp_path, b"no tar" * 200)
    pax = bytearray(archive({"caf\u00e9" * 50: b"x"}))
    pax[512:515] = b"zzz"
    with pytest.raises(DownloadError, match="extended header"):
        unpack(tmp_path, bytes(pax))


@settings(deadline=None)
@given(st.binary(max_size=2000), st.integers(0, 3))
def test_no_bytes_write_elsewhere_or_raise_anything_else(tmp_path_factory, noise, place):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "inner").mkdir()
    text = archive(FILES)
    with contextlib.suppress(DownloadError):
        unpack(outer / "inner", text[: 512 * place] + noise + text[512 * place :])
    assert [path.name for path in outer.iterdir()] == ["inner"]


@pytest.mark.parametrize("name", ["/a", "../a", "a/../b", "a\0b", "a\\b"])
def test_names_stay_below_the_directory(tmp_path, name):
    with pytest.raises(DownloadError):
        below(tmp_path, name)


def test_a_model_comes_as_one_archive(tmp_path):
    service, seen = Service(), []
    target = tmp_path / "out" / "model"
    assert make(service).download("x", target, lambda *progress: seen.append(progress)) == target
    assert contents(target) == FILES
    assert [path for path, _ in service.asked] == ["artifacts", "model.tar"]
    total = sum(map(len, FILES.values()))
    assert seen[-1] == (total, total)
    assert list(target.parent.iterdir()) == [target]


@settings(deadline=None)
@given(breaks=st.lists(st.integers(0, 15_000), max_size=6), ranges=st.booleans())
def test_a_model_is_whole_however_often_the_connection_breaks(tmp_path_factory, breaks, ranges):
    target = tmp_path_factory.mktemp("broken") / "model"
    make(Service(breaks=breaks, ranges=ranges)).download("x", target)
    assert contents(target) == FILES


def test_an_archive_that_was_cut_is_resumed_where_it_was_cut(tmp_path):
    service = Service(breaks=[700, 5000])
    make(service).download("x", tmp_path / "model")
    assert contents(tmp_path / "model") == FILES
    assert service.asked == [
        ("artifacts", None),
        ("model.tar", None),
        ("model.tar", "bytes=700-"),
        ("model.tar", "bytes=5700-"),
    ]


def test_an_archive_that_is_another_one_by_now_is_brought_from_its_beginning(tmp_path):
    service = Service(breaks=[5000], ranges=False)
    make(service).download("x", tmp_path / "model")
    assert contents(tmp_path / "model") == FILES
    assert [path for path, _ in service.asked] == ["artifacts", "model.tar", "model.tar"]


def test_what_is_there_is_not_brought_again(tmp_path):
    service = Service(breaks=[6000, 0, 100, 0])
    client = make(service, RetryPolicy(seconds=0))
    for _ in range(2):
        with pytest.raises(ServiceAway):
            client.download("x", tmp_path / "model")
        assert not (tmp_path / "model").exists()
    service.breaks.clear()
    service.asked.clear()
    client.download("x", tmp_path / "model")
    assert contents(tmp_path / "model") == FILES
    assert ("artifacts/model/config.json", None) not in service.asked
    (_, first), *others = [asked for asked in service.asked if asked[0] == "artifacts/model/model-00001.safetensors"]
    assert int(first[len("bytes=") : -1]) > 4000
    assert not others


def test_an_evil_archive_leaves_nothing(tmp_path):
    with pytest.raises(DownloadError, match="outside the directory"):
        make(Service(tar=archive({"a": b"x", "../../evil": b"x"}))).download("x", tmp_path / "deep" / "model")
    assert not contents(tmp_path)
    assert not any((tmp_path / "deep").iterdir())


def test_evil_names_of_files_leave_nothing(tmp_path):
    with pytest.raises(DownloadError, match="outside the directory"):
        make(Service(files={"../../evil": b"x"}, breaks=[0])).download("x", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_downloaded_model_is_what_the_run_wrote(tmp_path):
    """Before (af276e38): the damaged model was downloaded without an error (run without `commit`'s new `stage`)."""
    with commit(tmp_path / "model", "f", stage="export") as draft:
        (draft.path / "model.safetensors").write_bytes(b"weights")
    files = contents(tmp_path / "model")
    assert contents(make(Service(files=files)).download("x", tmp_path / "whole")) == files
    with pytest.raises(DownloadError, match=r"model\.safetensors is not what the run wrote"):
        make(Service(files={**files, "model.safetensors": b"wexghts"})).download("x", tmp_path / "damaged")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "whole"}


def test_a_directory_that_holds_something_is_kept(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(RunDirError, match="exists already"):
            make(Service()).download("x", target)
    (tmp_path / "empty").mkdir()
    make(Service()).download("x", tmp_path / "empty")
    assert contents(tmp_path / "empty") == FILES


def test_a_run_without_a_model(tmp_path):
    with pytest.raises(UserError, match="has no model yet"):
        make(Service(files={})).download("x", tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_does_not_take_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        make(Service()).download("x", tmp_path / "file" / "model")


@settings(deadline=None)
@given(breaks=st.lists(st.integers(0, 12_000), max_size=5), ranges=st.booleans())
def test_a_file_is_whole_however_often_the_connection_breaks(tmp_path_factory, breaks, ranges):
    target = tmp_path_factory.mktemp("file") / "weights"
    target.write_bytes(b"older")
    name = "model-00001.safetensors"
    make(Service(breaks=breaks, ranges=ranges)).fetch("x", f"model/{name}", target)
    assert contents(target.parent) == {"weights": FILES[name]}


def test_a_file_that_changes_meanwhile_is_brought_anew(tmp_path):
    service = Service(files={"a": b"old" * 100}, breaks=[100])

    def change(request):
        if request.headers.get("range"):
            service.files, service.version = {"a": b"new" * 100}, '"v2"'
        return service(request)

    make(change, PROMPT).fetch("x", "model/a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new" * 100


def test_a_file_that_cannot_be_had_leaves_the_older_one(tmp_path):
    (tmp_path / "a").write_bytes(b"older")
    with pytest.raises(ServiceProblem, match="gone"):
        make(lambda _: problem(404, "gone")).fetch("x", "a", tmp_path / "a")
    assert contents(tmp_path) == {"a": b"older"}
