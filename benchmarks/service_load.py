"""The service under load: `moedisco serve` over SQLite with 10,000 runs, and clients in another process.

requests      GET of a page of 50 runs and of one run, over 1, 8 and 32 kept connections
readers       1,000 event streams, half of them on one run that a driver reports to; the same requests meanwhile
report        metric points that drivers report over HTTP: one driver, then four at once
direct        metric points taken in by `database.ingest` itself, without HTTP

Each round has a fresh copy of the database and a fresh service. Its Ray does not answer: nothing but the service is
measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import service_seed
from benchmarks.harness import environment, figures, run_arm, spread, write_result
from benchmarks.service_client import Connection, Driver, Reader, follow, get, quantiles, requests
from benchmarks.service_seed import Seed
from service.database import ingest, runs
from service.database.session import Database
from service.settings import Settings

RUNS, PAGE, READERS, CONCURRENCIES, BATCH = 10_000, 50, 1000, (1, 8, 32), 1000
SECONDS = 4.0
LIVE_SECONDS, REPORTS_PER_SECOND, EVENTS_PER_REPORT = 10.0, 5, 4
FIGURES = 4
"""Metric points of one progress event."""
BATCHES = {"one driver": 60, "four drivers": 25, "direct": 60}
TARGETS = {
    "points_per_second": 20_000,  # over HTTP and directly, at least
    "runs_get_per_second": 300,  # of one run, over 8 connections, at least
    "delivery_p99_ms": 1000,  # of an event to 500 readers, at most
}
_PACKAGES = ("fastapi", "starlette", "uvicorn", "pydantic", "sqlalchemy", "structlog")


async def measure_requests(port: int, seed: Seed) -> dict[str, Any]:
    """Both kinds of request at every concurrency."""
    kinds = {
        "page": [get(f"/v1/runs?limit={PAGE}", seed.token)],
        "run": [get(f"/v1/runs/{run_id}", seed.token) for run_id in seed.ended],
    }
    return {kind: await _at_every_concurrency(port, wanted) for kind, wanted in kinds.items()}


async def _at_every_concurrency(port: int, wanted: list[bytes]) -> dict[int, dict[str, float]]:
    return {concurrency: await requests(port, wanted, concurrency, SECONDS) for concurrency in CONCURRENCIES}


async def measure_readers(port: int, seed: Seed) -> dict[str, Any]:
    """How late events reach their readers, and what requests see of that."""
    control = await Connection.open(port)
    first = json.loads(await control.ask(get(f"/v1/runs/{seed.live}", seed.token)))["events"]
    followed = [(seed.live, first) if i % 2 else (seed.quiet[i // 2 % len(seed.quiet)], 1) for i in range(READERS)]
    opening = time.perf_counter()
    readers = []
    for i in range(0, READERS, 50):  # as many at once as a browser's crowd would, not a thousand
        readers += await asyncio.gather(
            *(follow(port, seed.token, run_id, after) for run_id, after in followed[i : i + 50])
        )
    opened = time.perf_counter() - opening
    live = [reader for reader, (run_id, _) in zip(readers, followed, strict=True) if run_id == seed.live]
    driver = Driver(await Connection.open(port), seed.live, seed.keys[seed.live])
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_drive(driver, LIVE_SECONDS))
    alone = await _delivered(driver, live, 0)
    before = driver.sent
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_drive(driver, 6 * SECONDS + 1))
        under_way = tasks.create_task(measure_requests(port, seed))
    busy = await _delivered(driver, live, before)
    lost = sum(reader.lost for reader in readers)
    if lost:
        raise RuntimeError(f"{lost} readers were cut off")
    for reader in readers:
        reader.close()
    return {
        "opened_per_second": READERS / opened,
        "delivery": alone,
        "delivery_busy": busy,
        "requests": under_way.result(),
    }


async def _drive(driver: Driver, seconds: float) -> None:
    """Report at an even pace; late where the service is slower than that."""
    began = time.perf_counter()
    for number in range(int(seconds * REPORTS_PER_SECOND)):
        await asyncio.sleep(max(0.0, began + number / REPORTS_PER_SECOND - time.perf_counter()))
        await driver.report(_wire(driver.sent, EVENTS_PER_REPORT))


async def _delivered(driver: Driver, readers: list[Reader], since: int) -> dict[str, float]:
    """Wait until everything has arrived; from the beginning of a report to each reader's sight of it."""
    deadline = time.perf_counter() + 60
    while any(len(reader.arrived) < driver.sent for reader in readers):
        if time.perf_counter() > deadline:
            raise RuntimeError("events did not arrive")
        await asyncio.sleep(0.05)
    late = [
        arrived - sent
        for reader in readers
        for arrived, sent in zip(reader.arrived[since:], driver.began[since:], strict=True)
    ]
    return {**quantiles(late), "messages": len(late)}


async def measure_report(port: int, seed: Seed) -> dict[str, float]:
    """Metric points per second that drivers get rid of."""
    [one, *_] = drivers = [Driver(await Connection.open(port), run_id, seed.keys[run_id]) for run_id in seed.drivers]
    return {
        "one driver": await _flood([one], BATCHES["one driver"]),
        "four drivers": await _flood(drivers, BATCHES["four drivers"]),
    }


async def _flood(drivers: list[Driver], batches: int) -> float:
    events = {driver: _batches(driver.sent, batches) for driver in drivers}
    began = time.perf_counter()

    async def one(driver: Driver) -> None:
        for batch in events[driver]:
            await driver.report(batch)

    async with asyncio.TaskGroup() as tasks:
        for driver in drivers:
            tasks.create_task(one(driver))
    return FIGURES * BATCH * batches * len(drivers) / (time.perf_counter() - began)


def measure_direct(state_dir: Path, seed: Seed) -> dict[str, float]:
    """Metric points per second that the database takes in, one transaction per batch."""
    batches = [service_seed.progress(i * BATCH, BATCH) for i in range(BATCHES["direct"])]
    with contextlib.closing(Database(Settings(state_dir=state_dir).database)) as database:
        began = time.perf_counter()
        for number, batch in enumerate(batches):
            with database.write() as session:
                run = runs.get(session, seed.live)
                if run is None:
                    raise RuntimeError("the database is not the seeded one")
                ingest.take(session, run, number * BATCH, batch, time.time())
        return {"direct": FIGURES * BATCH * len(batches) / (time.perf_counter() - began)}


def _batches(first: int, count: int) -> list[list[dict[str, Any]]]:
    return [_wire(first + i * BATCH, BATCH) for i in range(count)]


def _wire(first: int, count: int) -> list[dict[str, Any]]:
    return [dataclasses.asdict(event) for event in service_seed.progress(first, count)]


@contextlib.contextmanager
def served(state_dir: Path) -> Iterator[tuple[int, psutil.Process]]:
    """The service in a process of its own: its port and its process."""
    with socket.socket() as free, socket.socket() as nobody:
        free.bind(("127.0.0.1", 0))
        nobody.bind(("127.0.0.1", 0))  # taken, and nobody listens: a Ray that does not answer
        port = free.getsockname()[1]
        free.close()
        with (state_dir / "serve.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "service",
                    "serve",
                    f"--port={port}",
                    f"--state-dir={state_dir}",
                    f"--output-root={state_dir / 'runs'}",
                    f"--ray-address=http://127.0.0.1:{nobody.getsockname()[1]}",
                    f"--requests-per-minute={10**9}",
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "XDG_CONFIG_HOME": str(state_dir)},
            )
        try:
            _wait_until_healthy(port, process, state_dir / "serve.log")
            yield port, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(60)


def _wait_until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/healthz").is_success:
                return
        time.sleep(0.1)
    raise RuntimeError(log.read_text(encoding="utf-8"))


def one_round(seeded: Path) -> dict[str, Any]:
    """Everything, once, with a database and a service of its own."""
    with tempfile.TemporaryDirectory() as home:
        state_dir = Path(home, "state")
        shutil.copytree(seeded, state_dir)
        where = [f"--state-dir={state_dir}"]
        direct = run_arm(__spec__.name, "direct", *where)
        shutil.rmtree(state_dir)
        shutil.copytree(seeded, state_dir)
        with served(state_dir) as (port, process):
            where.append(f"--port={port}")
            memory = {"start": process.memory_info().rss}
            measured = {}
            for arm in ("requests", "readers", "report"):
                measured[arm] = run_arm(__spec__.name, arm, *where)
                memory[f"after {arm}"] = process.memory_info().rss
    return {
        **measured,
        "report": {**measured["report"], **direct},
        "memory_mib": {when: size / 2**20 for when, size in memory.items()},
    }


def machine_and_own() -> tuple[float, float, float]:
    """Processor seconds that the machine had, that were used or stolen, and that this process and its children used.

    Seconds that a hypervisor took count as used.
    """
    machine = psutil.cpu_times()
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return (
        sum(machine),
        sum(machine) - machine.idle - machine.iowait,
        sum(usage.ru_utime + usage.ru_stime for usage in own),
    )


def others_share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """The share of the machine's processors that other work had between two looks."""
    had, used, own = (then - now for now, then in zip(before, after, strict=True))
    return max(0.0, used - own) / had


def combined(rounds: list[Any]) -> Any:
    """The same tree with the spread over the rounds in place of numbers."""
    if isinstance(rounds[0], dict):
        return {key: combined(figures(rounds, key)) for key in rounds[0]}
    return spread(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["requests", "readers", "report", "direct"])
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--port", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if arguments.arm:
        seed = service_seed.read(arguments.state_dir / "seed.json")
        arms = {"requests": measure_requests, "readers": measure_readers, "report": measure_report}
        print(
            json.dumps(
                measure_direct(arguments.state_dir, seed)
                if arguments.arm == "direct"
                else asyncio.run(arms[arguments.arm](arguments.port, seed))
            )
        )
        return
    with tempfile.TemporaryDirectory() as home:
        seeded = Path(home, "state")
        service_seed.write(service_seed.make(seeded, RUNS), seeded / "seed.json")
        rounds = []
        for turn in range(arguments.rounds):
            began = machine_and_own()
            measured = one_round(seeded)
            rounds.append({**measured, "others_share": others_share(began, machine_and_own())})
            print(f"round {turn + 1}/{arguments.rounds}: {json.dumps(rounds[-1])}", file=sys.stderr)
    result = environment("python -m benchmarks.service_load", "service")
    packages = {"python": result["versions"]["python"], "sqlite": sqlite3.sqlite_version}
    write_result(
        "service_load",
        {
            **result,
            "versions": packages | {name: version(name) for name in _PACKAGES},
            "setting": {
                "runs": RUNS,
                "page": PAGE,
                "readers": READERS,
                "reports_per_second": REPORTS_PER_SECOND,
                "events_per_report": EVENTS_PER_REPORT,
                "events_per_batch": BATCH,
                "points_per_event": FIGURES,
                "seconds_per_cell": SECONDS,
                "rounds": arguments.rounds,
            },
            "targets": TARGETS,
            **combined(rounds),
        },
    )


if __name__ == "__main__":
    main()
