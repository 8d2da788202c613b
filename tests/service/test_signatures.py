from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.background.deliveries import GIVE_UP_SECONDS, LONGEST_DELAY, delay, next_try
from service.background.launching import service_secret
from service.background.outgoing import is_public
from service.domain.signatures import driver_key, sign

NOW = 1_800_000_000.0


def test_a_signature_is_that_of_the_time_and_the_body():
    assert sign("whsec", b'{"a":1}', NOW + 0.9) == (
        "t=1800000000,v1=adf19a16865985b0891b0e7e4f6770e17d6bdd6462d897848f5adb661c4381bb")


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


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_waits_grow_up_to_an_hour_and_are_spread(attempts, fraction):
    assert delay(attempts, 0) <= delay(attempts, fraction) <= min(LONGEST_DELAY, 2 * delay(attempts, 0))
    assert delay(attempts, fraction) <= delay(attempts + 1, fraction)


@given(st.lists(st.floats(0, 1), min_size=100, max_size=100))
def test_what_does_not_arrive_is_tried_for_a_day_and_not_longer(fractions):
    now, attempts = NOW, 0
    for fraction in fractions:
        attempts += 1
        again = next_try(NOW, attempts, now, fraction)
        if again is None:
            break
        assert now < again <= NOW + GIVE_UP_SECONDS
        now = again
    assert now == NOW + GIVE_UP_SECONDS
    assert 24 <= attempts <= 60


@pytest.mark.parametrize("address", [
    "127.0.0.1", "127.8.9.1", "0.0.0.0", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
    "224.0.1.5", "255.255.255.255", "198.18.0.1", "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::",
    "2002:a9fe:a9fe::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "", "localhost", "2130706433", "0x7f.1"])
def test_addresses_of_ours_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet_are_public(address):
    assert is_public(address)
