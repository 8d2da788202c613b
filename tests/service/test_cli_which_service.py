"""Which service the commands of a user act on, when the user has started several."""

import functools
import sys
import types

import httpx
import pytest
from typer.testing import CliRunner

import service.client
from service import process
from service.cli import app
from service.client import Client

FIRST, SECOND = "http://127.0.0.1:8300", "http://127.0.0.1:9000"


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("MOEDISCO_URL", raising=False)
    monkeypatch.delenv("MOEDISCO_TOKEN", raising=False)
    pools = httpx.MockTransport(lambda _request: httpx.Response(200, json={"connected": True, "items": []}))
    monkeypatch.setattr(service.client, "Client", functools.partial(Client, transport=pools))
    return tmp_path


def serve(monkeypatch, home, name, url):
    """`moedisco serve` with a stand-in for the service itself; returns what it prints."""
    module = types.ModuleType("service.serve")
    started = types.SimpleNamespace(url=url, token="mdk_1", token_file=home / "token", sign_in_code="mdc_1")
    module.serve = lambda _settings, announce: announce(started)
    monkeypatch.setitem(sys.modules, "service.serve", module)
    (home / name).mkdir(exist_ok=True)
    found = CliRunner().invoke(app, ["serve", "--state-dir", str(home / name)])
    assert found.exit_code == 0, found.output
    return found.stdout


def remarks():
    """What a command prints on standard error."""
    found = CliRunner().invoke(app, ["pools"])
    assert found.exit_code == 0, found.output
    return found.stderr


def test_a_command_names_its_service_when_it_is_another_than_that_of_the_last_command(monkeypatch, home):
    """One of the services listens at the default address, which commands do not name.

    Before (af276e38): after the second service had started at the default address, the command printed nothing.
    """
    serve(monkeypatch, home, "one", SECOND)
    remarks()
    serve(monkeypatch, home, "two", FIRST)
    assert remarks() == f"moedisco: now using {FIRST} (state directory {home / 'two'})\n"
    assert remarks() == ""
    serve(monkeypatch, home, "one", SECOND)
    assert remarks() == f"moedisco: now using {SECOND} (state directory {home / 'one'})\n"
    serve(monkeypatch, home, "two", SECOND)
    assert remarks() == f"moedisco: now using {SECOND} (state directory {home / 'two'})\n"


def test_serve_says_which_running_service_the_commands_leave(monkeypatch, home):
    """Before (af276e38): the second `serve` printed only its own address."""
    serve(monkeypatch, home, "one", FIRST)
    with process.locked(home / "one") as record:
        record(FIRST)
        out = serve(monkeypatch, home, "two", SECOND)
        assert f"Your commands leave {FIRST} (state directory {home / 'one'}), which still runs" in out
        assert "Your commands leave" not in serve(monkeypatch, home, "two", SECOND)
    assert "Your commands leave" not in serve(monkeypatch, home, "one", FIRST)


def test_a_damaged_address_file_does_not_keep_serve_from_writing_it_again(monkeypatch, home):
    (home / "config" / "moedisco").mkdir(parents=True)
    (home / "config" / "moedisco" / "service.json").write_text("{")
    serve(monkeypatch, home, "one", SECOND)
    assert remarks().count("\n") == 1
