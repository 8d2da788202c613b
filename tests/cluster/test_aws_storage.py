"""The role of aws/account.yaml lets a node do all that a run needs in its folder in S3, and nothing elsewhere."""

from __future__ import annotations

import pickle

import boto3
import botocore.exceptions
import pytest
from aws_offline import Role, aws_server, client, credentials, deploy_account, role_statements
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer
from ray.train.v2._internal.execution.storage import StorageContext
from small_run import small_config

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.locations import CACHE
from moedisco_ray.core.store.remote import Remote, resolve
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.ray.train_storage import train_storage

OWN = "s3://corpus/moedisco"


@pytest.fixture(scope="module")
def servers():
    """An empty AWS with the stack of the account, and a server that lets the role of its workers do what it may."""
    with aws_server() as url:
        deploy_account(url)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        guard = Role(server._server.app, role_statements(url, "moedisco-worker"))
        server._server.app = guard
        host, port = server.get_host_and_port()
        yield url, guard, f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def role(servers, monkeypatch, tmp_path):
    """The worker's role at a server with the bucket of the stack, and an object next to the folder."""
    url, guard, guarded = servers
    s3_backends[DEFAULT_ACCOUNT_ID].reset()
    s3 = client(url, "s3")
    s3.create_bucket(Bucket="corpus")
    s3.create_bucket(Bucket="another")
    s3.put_object(Bucket="corpus", Key="moedisco-not/secret", Body=b"secret")
    guard.refused.clear()
    for name, value in (credentials(guarded) | {CACHE: str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return guard


@pytest.mark.cluster
def test_a_run_needs_nothing_more_than_its_folder(role):
    events: list[Event] = []
    config = small_config("unused").model_copy(update={"output": f"{OWN}/runs"})
    pipeline.run(config, (events.append,), backend=LocalBackend())
    pipeline.run(config, backend=LocalBackend())  # finds the outputs of the first
    assert role.refused == []
    assert {event.type for event in events} >= {"checkpoint", "run_finished"}


def test_ray_train_needs_nothing_more_than_the_folder(role):
    system, path = resolve(f"{OWN}/runs")
    with pytest.raises(OSError, match="HeadBucket"):  # then `train_storage` is not needed any more
        system.create_dir(path)
    role.refused.clear()
    path, system = train_storage(f"{OWN}/runs/a/checkpoints")
    storage = StorageContext(path, "finetune", storage_filesystem=system)
    with system.open_output_stream(f"{storage.experiment_fs_path}/snapshot.json") as stream:
        stream.write(b"{}")
    StorageContext(path, "finetune", storage_filesystem=pickle.loads(pickle.dumps(system)))  # a worker's
    assert role.refused == []
    assert set(Remote(f"{OWN}/runs", "output").list()) == {
        "a/checkpoints/finetune/.validate_storage_marker",
        "a/checkpoints/finetune/snapshot.json",
    }


@pytest.mark.parametrize(
    "location", ["s3://corpus", "s3://corpus/moedisco-not", "s3://corpus/other", "s3://another/moedisco"]
)
def test_nothing_else_is_read_written_listed_or_deleted(role, location):
    place = Remote(location, "output")
    for attempt in (
        lambda: place.read("secret"),
        lambda: place.write("mine", b""),
        place.list,
        lambda: place.delete("secret"),
    ):
        role.refused.clear()
        with pytest.raises(ConfigError):
            attempt()
        assert role.refused


def test_the_names_in_the_bucket_stay_unknown(role):
    s3 = boto3.client("s3")
    for arguments in ({}, {"Prefix": ""}, {"Prefix": "m"}, {"Prefix": "moedisco-"}):
        with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
            s3.list_objects_v2(Bucket="corpus", **arguments)
    assert s3.list_objects_v2(Bucket="corpus", Prefix="moedisco/")["KeyCount"] == 0
