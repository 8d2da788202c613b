import contextlib
from pathlib import Path

import pytest
from pydantic import ValidationError

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError
from service.domain.path_sandbox import check_roots, sandboxed
from service.settings import Settings, check_bind


def settings(tmp_path: Path, **changes) -> Settings:
    return Settings(**{"state_dir": tmp_path} | changes)


def test_paths_are_absolute_and_without_links(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    made = settings(tmp_path / "link", input_roots=("link", "."), output_roots=(Path("link/runs"),))
    assert made.state_dir == tmp_path / "real"
    assert made.input_roots == (str(tmp_path / "real"), str(tmp_path))
    assert made.output_roots == (tmp_path / "real" / "runs",)


def test_the_database_is_a_file_of_the_state_directory_unless_one_is_named(tmp_path):
    assert settings(tmp_path).database == f"sqlite:///{tmp_path}/service.sqlite3"
    assert settings(tmp_path, database_url="postgresql+psycopg:///x").database == "postgresql+psycopg:///x"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8300"),
        ("0.0.0.0", "http://127.0.0.1:8300"),
        ("::", "http://127.0.0.1:8300"),
        ("::1", "http://[::1]:8300"),
        ("node-1", "http://node-1:8300"),
    ],
)
def test_drivers_report_to_where_the_service_listens(tmp_path, host, url):
    assert settings(tmp_path, host=host).report_url("RUN") == f"{url}/v1/runs/RUN/report"


def test_a_public_url_goes_before_the_address(tmp_path):
    assert settings(tmp_path, public_url="https://moe.example/x/").url == "https://moe.example/x"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "node-1"])
def test_a_public_address_needs_a_token(tmp_path, host):
    with pytest.raises(ConfigError, match="no token is valid"):
        check_bind(settings(tmp_path, host=host), tokens=0)
    check_bind(settings(tmp_path, host=host), tokens=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_loopback_address_needs_none(tmp_path, host):
    check_bind(settings(tmp_path, host=host), tokens=0)


@pytest.mark.parametrize("setting", ["input_roots", "output_roots", "storage_roots"])
@pytest.mark.parametrize(
    "root", ["http://h/x", "s3://", "s3://bucket/../x", "s3://bucket?endpoint_override=h", "s3://key:secret@bucket"]
)
def test_a_root_is_a_directory_or_a_plain_bucket(tmp_path, setting, root):
    with pytest.raises(ValidationError, match="root"):
        settings(tmp_path, **{setting: (root,)})


def test_an_azure_container_is_a_root(tmp_path):
    root = "abfss://texts@account.dfs.core.windows.net/wiki"
    assert settings(tmp_path, input_roots=(f"{root}/",)).input_roots == (root,)


def test_settings_do_not_change(tmp_path):
    with pytest.raises(ValidationError, match="frozen"):
        settings(tmp_path).port = 1


@pytest.mark.parametrize(("root", "allowed"), [("data", False), ("data/hf", True), ("data/hf/hub", True)])
def test_the_hubs_folder_below_an_input_root_is_denied_when_a_run_is_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, allowed: bool
) -> None:
    (tmp_path / "data" / "hf" / "hub").mkdir(parents=True)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "data" / "hf"))
    roots = Settings(state_dir=tmp_path / "state", input_roots=(str(tmp_path / root),)).roots
    check_roots(roots)
    for name, accepted in (("hub", allowed), ("token", False)):
        raw = {"name": "a", "corpus": {"sources": [{"path": str(tmp_path / "data" / "hf" / name)}]}}
        with contextlib.nullcontext() if accepted else pytest.raises(ConfigError):
            sandboxed(check_config(raw), roots)
