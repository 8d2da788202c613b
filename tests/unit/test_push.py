"""`moedisco push`: a run's model in a repository of the hub."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_standin import Hub, hub
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from moe_models import random_tensors, tiny_config
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import Model, check_config
from moedisco_ray.core.config.start_files import start_with_weights
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.models import check_same, open_checkpoint, write_checkpoint

# huggingface_hub's own, at a plain upload
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "me/tiny-moe"
CARD = "---\nlibrary_name: transformers\nlicense: mit\n---\n# tiny\n"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(tmp_path / "hub-cache") as found:
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with a finished model."""
    config = tiny_config("mixtral", 4)
    model = tmp_path / "runs" / "tiny" / "model"
    write_checkpoint(model, random_tensors(config).items(), config)
    (model / "README.md").write_text(CARD)
    write_json(model / "manifest.json", with_checksum({"fingerprint": "f", "files": {}}))
    stored = check_config({"name": "tiny", "corpus": {"sources": [{"path": "embedded"}]}, "tokens": {"total": 10**6}})
    write_json(model.parent / "config.json", with_checksum(stored.model_dump(mode="json")))
    return model.parent


def push(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["push", *arguments])
    return done.exit_code, done.output


@pytest.mark.ecosystem("Use: push to a hub (a stand-in on loopback)", "huggingface-hub")
def test_a_pushed_model_is_private_whole_and_a_start_again(server: Hub, run: Path) -> None:
    code, output = push(str(run), NAME, "--json")
    assert code == 0, output
    pushed = json.loads(output[output.index("{") :])
    assert pushed == {
        "url": f"{server.url}/{NAME}",
        "commit": server.repositories[NAME].branches["main"],
        "private": True,
    }
    assert server.repositories[NAME].private
    files = server.repositories[NAME].commits[pushed["commit"]]
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    assert files["README.md"].decode() == CARD
    assert server.token not in output
    start = with_start(Model.model_validate({"init": {"checkpoint": f"hf://{NAME}"}}))
    assert start.family_name == "mixtral"
    check_same(open_checkpoint(start_with_weights(start.init)), open_checkpoint(run / "model"))


@pytest.mark.ecosystem("Use: push to a hub (a stand-in on loopback)", "huggingface-hub")
def test_a_model_is_published_only_on_request(server: Hub, run: Path) -> None:
    code, output = push(str(run), NAME, "--public")
    assert (code, server.repositories[NAME].private) == (0, False), output
    commits = len(server.repositories[NAME].commits)
    code, output = push(str(run / "model"), NAME)
    assert code == 2
    assert f"REPO: '{NAME}': exists and is public; pass --public to publish the model, or choose another name" in output
    assert len(server.repositories[NAME].commits) == commits
    assert push(str(run / "model"), NAME, "--public")[0] == 0


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(server: Hub, run: Path) -> None:
    assert push(str(run), NAME)[0] == 0
    one_file, config = open_checkpoint(run / "model"), tiny_config("mixtral", 4)
    more = run.parent / "more"
    write_checkpoint(more, ((key, -tensor) for key, tensor in one_file.items()), config, max_shard_bytes=8000)
    assert not (more / "model.safetensors").exists()
    assert push(str(more), NAME)[0] == 0
    files = server.repositories[NAME].commits[server.repositories[NAME].branches["main"]]
    assert "model.safetensors" not in files, "transformers would load this file, of the earlier model"
    start = with_start(Model.model_validate({"init": {"checkpoint": f"hf://{NAME}"}}))
    check_same(open_checkpoint(start_with_weights(start.init)), open_checkpoint(more))
    assert push(str(run), NAME)[0] == 0
    files = server.repositories[NAME].commits[server.repositories[NAME].branches["main"]]
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}


def raised_from(cause: Exception) -> RuntimeError:
    """What huggingface_hub raises if the thread that uploads a file fails."""
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = cause
    return error


GONE = FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone/model.safetensors")
FULL = OSError(errno.ENOSPC, "No space left on device")
UNREACHABLE = [
    ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    socket.gaierror(-2, "Name or service not known"),
    OfflineModeIsEnabled("offline"),
    TimeoutError(errno.ETIMEDOUT, "timed out"),
]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        *(
            (
                error,
                2,
                (
                    "RUN_DIR: '/gone/model.safetensors': cannot be uploaded from here (No such file or directory); "
                    "correct this"
                ),
            )
            for error in (GONE, raised_from(GONE))
        ),
        *(
            (error, 2, "model': cannot be uploaded from here (No space left on device); correct this and push again")
            for error in (FULL,)
        ),
        *((error, 1, f"{NAME}: the hub cannot be reached") for error in UNREACHABLE),
    ],
)
def test_a_local_failure_is_not_said_to_be_the_hubs(
    server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, line: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "upload_folder", fails)
    found, output = push(str(run), NAME)
    assert (found, line in output) == (code, True), output


def test_mistakes_are_one_line(server: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, line in (
        ((str(run), "no name"), "REPO: 'no name': is no name of a repository; write ORG/NAME"),
        ((str(run), "tiny"), "REPO: 'tiny': is no name of a repository; write ORG/NAME"),
        ((str(tmp_path), NAME), "holds no finished model; name a finished run"),
    ):
        code, output = push(*arguments)
        assert (code, line in output) == (2, True), output
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_reader")
    code, output = push(str(run), NAME)
    assert (code, "may not be written with this HF_TOKEN" in output) == (2, True), output
    assert "hf_of_a_reader" not in output
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, output = push(str(run), NAME)
    assert (code, "the hub cannot be reached; try again when you are online" in output) == (1, True), output
    monkeypatch.delenv("HF_TOKEN")
    code, output = push(str(run), NAME)
    assert (code, "needs an access token that may write, in the environment variable HF_TOKEN" in output) == (
        2,
        True,
    ), output
