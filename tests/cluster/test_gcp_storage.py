"""What the nodes of Google Cloud ask of storage: nothing but objects and listings below the folder of their role."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

from gcs_standin import gcs_server
from ray.train.v2._internal.execution.storage import StorageContext

from moedisco_ray.core.store.locations import joined
from moedisco_ray.core.store.remote import Remote
from moedisco_ray.execution.ray.train_storage import train_storage


def object_of(path):
    """Object or prefix that a request names; None if it names neither."""
    parts = urlsplit(path)
    query = parse_qs(parts.query)
    _, sign, name = parts.path.partition("/b/corpus/o")
    if not sign:
        return None
    return unquote(name[1:]) or query.get("name", query.get("prefix", [None]))[0]


def test_all_requests_stay_in_the_folder(tmp_path):
    with gcs_server("corpus", tmp_path / "requests") as bucket:
        runs = joined(bucket, "moedisco", "runs")
        remote = Remote(runs, "output")
        remote.write("a/one", b"1")
        remote.write("a/two", b"2")
        assert (remote.read("a/one"), remote.read("a/none")) == (b"1", None)
        assert remote.list() == remote.list("a") == {"a/one": 1, "a/two": 1}
        assert remote.modified("a/one")
        remote.delete("a/one")
        remote.delete_folder("a")
        assert remote.list() == {}
        path, system = train_storage(runs)
        StorageContext(path, "finetune", storage_filesystem=system)
        assert list(remote.list()) == ["finetune/.validate_storage_marker"]
    asked = (tmp_path / "requests").read_text().splitlines()
    assert len(asked) > 20
    assert not [path for path in asked if not (object_of(path) or "").startswith("moedisco/")]
