from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

from service.background.launching import service_secret
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


def test_the_secret_is_created_once_and_readable_by_its_owner_only(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        secrets = set(pool.map(lambda _: service_secret(tmp_path / "state"), range(32)))
    assert secrets == {service_secret(tmp_path / "state")}
    assert len(secrets.pop()) == 32
    [file] = (tmp_path / "state").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
