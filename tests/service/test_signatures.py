from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from moedisco_ray.core.errors import ConfigError
from service.bootstrap import service_secrets, show_messages_secret
from service.domain.signatures import driver_key, sign

NOW = 1_800_000_000.0


def test_a_signature_is_that_of_the_time_and_the_body():
    assert sign("whsec", b'{"a":1}', NOW + 0.9) == (
        "t=1800000000,v1=adf19a16865985b0891b0e7e4f6770e17d6bdd6462d897848f5adb661c4381bb"
    )


def test_each_attempt_has_its_own_key_and_always_the_same():
    keys = {driver_key(secret, run, attempt) for secret in (b"a", b"b") for run in ("R", "S") for attempt in (1, 2, 11)}
    assert len(keys) == 12
    assert driver_key(b"a", "R", 1) == driver_key(b"a", "R", 1)
    assert {len(key) for key in keys} == {32}


def test_replicas_that_start_at_once_share_their_secrets(database, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda number: service_secrets(database, tmp_path / str(number)), range(16)))
    assert len(found) == 1
    assert len(found.pop().drivers) == 32
    assert not list(tmp_path.glob("*/secret"))


def test_the_files_of_an_earlier_version_are_adopted_once(database, tmp_path, caplog):
    (tmp_path / "secret").write_bytes(b"of drivers")
    (tmp_path / "webhook-secret").write_text("of messages")
    first = service_secrets(database, tmp_path)
    assert (first.drivers, first.messages) == (b"of drivers", "of messages")
    (tmp_path / "secret").write_bytes(b"of another")
    assert service_secrets(database, tmp_path) == first == service_secrets(database, tmp_path / "other")
    assert "secret is not used" in caplog.text


def test_the_secret_of_messages_is_shown_in_a_file_for_its_owner_only(tmp_path, caplog):
    show_messages_secret(tmp_path / "state", "whsec")
    [file] = (tmp_path / "state").iterdir()
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("whsec", 0o600)
    show_messages_secret(tmp_path / "state", "another")
    assert "webhook-secret is not the secret that signs messages" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--state-dir: '.*webhook-secret': cannot be read or written"):
        show_messages_secret(tmp_path / "file", "whsec")
