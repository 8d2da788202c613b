"""Tokens of joining machines, the tunnels that they take, and what a machine says when it cannot join."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time

import pytest
from card_standin import write_torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedisco_ray.contrib.join import head
from moedisco_ray.contrib.join.connection import explain
from moedisco_ray.contrib.join.machine import Machine, check_versions
from moedisco_ray.contrib.join.token import JoinToken, address
from moedisco_ray.core.errors import ConfigError
from service.cli import app

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def token(**changes):
    return JoinToken(
        **{
            "host": "head.example",
            "port": 7722,
            "host_key": "ssh-ed25519 AAAA",
            "user": head.USER,
            "slot": 3,
            "network": "10.97.0.0/16",
            "key": "KEY",
            "certificate": "CERTIFICATE",
            "expires": time.time() + 60,
        }
        | changes
    )


@given(host=WORDS, key=WORDS, slot=st.integers(1, 1000), expires=st.floats(1, 1e10))
def test_a_token_is_one_word_that_is_read_back(host, key, slot, expires):
    made = token(host=host, key=key, slot=slot, expires=expires)
    assert re.fullmatch(r"mdj1\.[\w=-]+", made.encoded())
    assert JoinToken.decode(f" {made.encoded()}\n", now=expires - 1) == made


@given(st.data())
def test_a_damaged_token_is_refused_without_showing_it(data):
    word = token(expires=4e9).encoded()
    start, end = sorted(data.draw(st.lists(st.integers(0, len(word)), min_size=2, max_size=2, unique=True)))
    damaged = word[:start] + word[end:]
    with pytest.raises(ConfigError, match="is not a join token") as error:
        JoinToken.decode(damaged)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize("text", ["", "mdj1.", "word", "mdj1.AAAA", "ü" * 10_000])
def test_other_words_are_no_tokens(text):
    with pytest.raises(ConfigError, match="is not a join token"):
        JoinToken.decode(text)


@given(st.floats(1, 1e9))
def test_a_token_expires_when_it_says(expires):
    word = token(expires=expires).encoded()
    JoinToken.decode(word, now=expires - 0.5)
    with pytest.raises(ConfigError, match="expired at"):
        JoinToken.decode(word, now=expires)


@given(st.sets(st.integers(0, 1000), min_size=2))
def test_every_machine_has_an_address_of_its_own(slots):
    found = {address("10.97.0.0/16", slot) for slot in slots}
    assert len(found) == len(slots)
    assert not any(each.endswith((".0.0", ".255.255")) for each in found)


@pytest.mark.parametrize(
    ("network", "fits"),
    [
        ("10.97.0.0/16", True),
        ("10.97.0.0/23", True),
        ("10.97.0.0/24", False),
        ("10.97.0.1/16", False),
        ("office", False),
    ],
)
def test_a_network_needs_an_address_for_every_machine(network, fits):
    settings = head.Gateway(host="head.example", port=7722, network=network, machines=32)
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"--network: '.*': is no IPv4 network"):
        head.check_network(settings)


@pytest.fixture
def gateway(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    directory = tmp_path / "gateway"
    for name in ("used", "slots", "machines"):
        (directory / name).mkdir(parents=True)
    for name in ("ca", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name], check=True)
    settings = head.Gateway(host="head.example", port=7722, network="10.97.0.0/16", machines=2)
    (directory / "gateway.json").write_text(settings.model_dump_json())
    return directory


def certificate(made, folder):
    """What ssh-keygen prints of a token's certificate, by its headings."""
    path = folder / "cert.pub"
    path.write_text(made.certificate)
    return subprocess.run(["ssh-keygen", "-L", "-f", path], check=True, capture_output=True, text=True).stdout


def test_a_certificate_allows_one_command_and_has_no_extension(gateway, tmp_path):
    made = head.issue(gateway, 60)
    text = certificate(made, tmp_path)
    assert f"force-command {gateway}/offer.sh" in text
    assert "Extensions: (none)" in text
    assert re.search(r"Principals:\s+join\n", text)
    first, last = re.search(r"Valid: from (\S+) to (\S+)", text).groups()
    seconds = [time.mktime(time.strptime(each, "%Y-%m-%dT%H:%M:%S")) for each in (first, last)]
    assert seconds[1] == pytest.approx(made.expires, abs=1)
    assert seconds[1] - seconds[0] == pytest.approx(3600 + 300, abs=1)


def test_tunnels_are_given_once_and_come_back(gateway):
    now = time.time()
    first, second = head.issue(gateway, 60, now), head.issue(gateway, 60, now)
    assert (first.slot, second.slot) == (1, 2)
    with pytest.raises(ConfigError, match="every tunnel has a machine or an unused token"):
        head.issue(gateway, 60, now)
    assert head.issue(gateway, 60, now + 3600).slot == 1, "an unused token has expired"
    serial = json.loads((gateway / "slots" / "2").read_text())["serial"]
    (gateway / "used" / str(serial)).touch()
    assert head.issue(gateway, 60, now).slot == 2, "a used token whose machine has left"


def test_a_machine_that_may_come_back_keeps_its_tunnel_while_others_are_free(gateway):
    now = time.time()

    def away(slot, seconds):
        machine = gateway / "machines" / str(slot)
        machine.write_text("KEY")
        os.utime(machine, (now - seconds, now - seconds))
        return machine

    first = away(1, 1000)
    assert head.issue(gateway, 60, now).slot == 2
    (gateway / "slots" / "2").unlink()
    second = away(2, 100)
    assert head.issue(gateway, 60, now).slot == 1, "away for longer"
    assert (first.exists(), second.exists()) == (False, True), "and it may not come back"


def test_a_revoked_machine_may_neither_come_back_nor_come(gateway):
    made = head.issue(gateway, 60)
    (gateway / "machines" / str(made.slot)).write_text("KEY")
    head.revoke(gateway, made.own_address)
    assert not (gateway / "machines" / str(made.slot)).exists()
    serial = json.loads((gateway / "slots" / str(made.slot)).read_text())["serial"]
    assert (gateway / "used" / str(serial)).exists()
    with pytest.raises(ConfigError, match=r"--revoke: '10\.0\.0\.9': is no address of a machine that joins"):
        head.revoke(gateway, "10.0.0.9")


def test_a_token_needs_a_gateway(tmp_path, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    with pytest.raises(ConfigError, match="start `moedisco join-gateway`"):
        head.issue(tmp_path, 60)


@pytest.mark.parametrize(
    "command",
    [["join-token"], ["join-gateway", "--public-host=x", "--ray-address=a:1"], ["join", token(expires=4e9).encoded()]],
)
def test_commands_need_root_and_say_so(command, monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 2
    assert f"moedisco {command[0]}: needs root" in ended.stderr


def test_a_machine_without_gpu_needs_a_number_of_slots(monkeypatch):
    monkeypatch.setattr("moedisco_ray.contrib.join.machine.require_root", lambda: None)
    monkeypatch.setenv("PATH", "/nowhere")
    ended = CliRunner().invoke(app, ["join", token().encoded()])
    assert (ended.exit_code, "--gpus: 0: this machine has no NVIDIA GPU" in ended.stderr) == (2, True)


def test_a_machine_whose_card_torch_cannot_use_opens_no_connection(tmp_path, monkeypatch):
    """Before (a0c02aba): it went on to open the connection: "the head does not answer there"."""
    monkeypatch.setattr("moedisco_ray.contrib.join.machine.require_root", lambda: None)
    monkeypatch.setenv("PYTHONPATH", str(write_torch(tmp_path / "path", "too old")))
    made = token(host="127.0.0.1", port=1, host_key="ssh-ed25519 AAAA")
    ended = CliRunner().invoke(app, ["join", made.encoded(), "--gpus=1"])
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("moedisco: --gpus: 1: torch cannot use card 0 (NVIDIA L4) of node ")
    assert "The NVIDIA driver on your system is too old" in line


@pytest.mark.parametrize(
    ("stderr", "says"),
    [
        ("u@h: Permission denied (publickey).", "it was used before, or another head issued it"),
        ("Host key verification failed.", "another machine than the head"),
        ("Tunnel device open failed.", "needs root and CAP_NET_ADMIN"),
        (
            "ssh: connect to host h port 7722: Connection refused",
            "does not answer there (ssh: connect to host h port 7722: Conn",
        ),
        ("", "no reason given"),
    ],
)
def test_what_ssh_says_is_explained_in_one_line(stderr, says):
    line = str(explain(stderr, token()))
    assert says in line
    assert "\n" not in line


def test_a_machine_that_is_refused_later_hears_why():
    assert "revoked or away for days" in str(explain("u@h: Permission denied (publickey).", token(), first=False))


def test_another_version_is_refused():
    check_versions({"ray": "2.60.0"}, {"ray": "2.60.0", "python": "3.11"})
    with pytest.raises(ConfigError, match=r"ray: '2.59.0': the head has 2.60.0"):
        check_versions({"ray": "2.60.0"}, {"ray": "2.59.0"})


def test_a_node_offers_its_tag_and_no_cpu():
    machine = Machine(tag="low_mem_gpu", slots=2, gpus=2, labels={"moedisco/pool": "low_memory"})
    arguments = machine.arguments("10.0.0.5:6379", "10.97.1.1")
    assert "--num-cpus=0" in arguments
    assert '--resources={"low_mem_gpu": 2}' in arguments
