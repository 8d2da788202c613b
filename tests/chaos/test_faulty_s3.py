from __future__ import annotations

import contextlib
import http.client
import itertools
from collections.abc import Iterator

import boto3
import pytest
from faulty_s3 import Fault, FaultyS3, faulty_s3, seeded
from pyarrow import fs
from s3_standin import s3_server

DATA = bytes(range(256)) * 8000


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[FaultyS3, str]]:
    with s3_server("bucket") as server, faulty_s3(server) as found:
        yield found


@pytest.fixture
def store(proxied: tuple[FaultyS3, str]) -> fs.FileSystem:
    proxied[0].faults = seeded([], 0.0, 0)
    store, bucket = fs.FileSystem.from_uri(f"s3://bucket?endpoint_override={proxied[1]}&scheme=http")
    with store.open_output_stream(f"{bucket}/object") as stream:
        stream.write(DATA)
    return store


def test_half_of_an_answer_comes_which_says_that_it_would_be_whole(
    proxied: tuple[FaultyS3, str], store: fs.FileSystem
) -> None:
    del store
    proxied[0].faults = seeded(["cut"], 1.0, 0)
    client = boto3.client("s3", endpoint_url=f"http://{proxied[1]}")
    signed = client.generate_presigned_url("get_object", {"Bucket": "bucket", "Key": "object"})
    with contextlib.closing(http.client.HTTPConnection(proxied[1])) as connection:
        connection.request("GET", signed.partition(proxied[1])[2])
        with pytest.raises(http.client.IncompleteRead) as cut:
            connection.getresponse().read()
    assert (cut.value.partial, cut.value.expected) == (DATA[: len(DATA) // 2], len(DATA) - len(DATA) // 2)


@pytest.mark.parametrize("fault", ["refuse", "throttle", "slow", "cut"])
def test_a_reader_that_meets_with_a_fault_once_gets_the_bytes(
    proxied: tuple[FaultyS3, str], store: fs.FileSystem, fault: Fault
) -> None:
    proxy, _ = proxied
    requests, before = itertools.count(), proxy.counts[fault]
    proxy.faults = lambda method, _path: fault if method == "GET" and not next(requests) else "pass"
    with store.open_input_stream("bucket/object") as stream:
        assert stream.read() == DATA
    assert proxy.counts[fault] == before + 1
    with store.open_input_file("bucket/object") as file:
        assert file.read_at(300, 100) == DATA[100:400]


def test_faults_take_turns_and_a_seed_draws_their_moments() -> None:
    faults: list[Fault] = ["refuse", "cut"]
    drawn = [[seeded(faults, 0.5, seed)("GET", "")] for seed in (0, 0)]
    assert drawn[0] == drawn[1]
    always = seeded(faults, 1.0, 0)
    assert [always("GET", "") for _ in range(4)] == faults * 2
    found = seeded(faults, 0.1, 1)
    met = sum(found("PUT", "") != "pass" for _ in range(2000))
    assert 140 < met < 260
