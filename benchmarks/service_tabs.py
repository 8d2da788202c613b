"""The service of a team: 1,000 runs, 50 tabs of the page, and drivers that report 5,000 events a minute.

Half of the tabs show the list. The others show one of five runs under way: its events, and what the page asks for again
and again. With `--against`, another checkout that has this file takes turns with this one under the same load.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import service_seed
from benchmarks.harness import ROOT, commit_of, environment, run_arm, write_result
from benchmarks.service_client import Connection, Driver, Reader, follow, get, quantiles
from benchmarks.service_load import combined, machine_and_own, others_share, served
from benchmarks.service_seed import Seed

RUNS, TABS, EVENTS_PER_MINUTE = 1000, 50, 5000
LIST, RUN, POOLS = 3.0, 5.0, 10.0
"""Seconds between two requests of one tab, as on the page."""
REPORT = 0.8
"""Seconds between two reports of one driver."""
WARM_UP, SECONDS = 5.0, 60.0
TARGETS = {"list_p99_ms": 50}


@dataclasses.dataclass(frozen=True)
class Load:
    """What was asked: the end (on the clock of `perf_counter`) and the duration (s) of each request, by its kind."""

    asked: dict[str, list[tuple[float, float]]]

    def since(self, moment: float) -> dict[str, list[float]]:
        """The durations of the requests that ended later than a moment."""
        return {kind: _later(asked, moment) for kind, asked in self.asked.items()}


def _later(asked: list[tuple[float, float]], moment: float) -> list[float]:
    return [took for end, took in asked if end > moment]


async def tabs(port: int, process: psutil.Process, seed: Seed) -> dict[str, Any]:
    """A minute of a team's day."""
    live = [seed.live, *seed.drivers]
    load = Load({"list": [], "run": [], "pools": [], "report": []})
    began = time.perf_counter()
    end = began + WARM_UP + SECONDS

    async def every(seconds: float, wanted: bytes, kind: str, number: int) -> None:
        connection = await Connection.open(port)
        for moment in _moments(began + seconds * number / TABS, seconds, end):
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            asked = time.perf_counter()
            await connection.ask(wanted)
            load.asked[kind].append((time.perf_counter(), time.perf_counter() - asked))
        connection.close()

    async def report(run_id: str, number: int) -> None:
        driver = Driver(await Connection.open(port), run_id, seed.keys[run_id])
        per_second = EVENTS_PER_MINUTE / 60 / len(live)
        for moment in _moments(began + REPORT * number / len(live), REPORT, end):
            await asyncio.sleep(max(0.0, moment - time.perf_counter()))
            due = int((moment - began) * per_second) - driver.sent
            events = [dataclasses.asdict(event) for event in service_seed.progress(driver.sent, max(1, due))]
            asked = time.perf_counter()
            await driver.report(events)
            load.asked["report"].append((time.perf_counter(), time.perf_counter() - asked))

    async def measured() -> dict[str, Any]:
        await asyncio.sleep(WARM_UP)
        moment, spent = time.perf_counter(), _processor_seconds(process)
        await asyncio.sleep(SECONDS)
        took = load.since(moment)
        spent = _processor_seconds(process) - spent
        count = sum(len(each) for each in took.values())
        return {
            "requests_per_second": count / SECONDS,
            "processor_share": spent / SECONDS,
            "processor_ms_per_request": 1000 * spent / count,
            **{f"{kind}_ms": quantiles(each) for kind, each in took.items()},
        }

    streams = [await _stream(port, seed.token, live[number % len(live)]) for number in range(TABS // 2)]
    async with asyncio.TaskGroup() as tasks:
        result = tasks.create_task(measured())
        for number in range(TABS // 2):
            tasks.create_task(every(LIST, get("/v1/runs?limit=50", seed.token), "list", 2 * number))
            run = get(f"/v1/runs/{live[number % len(live)]}", seed.token)
            tasks.create_task(every(RUN, run, "run", 2 * number + 1))
            tasks.create_task(every(POOLS, get("/v1/pools", seed.token), "pools", 2 * number + 1))
        for number, run_id in enumerate(live):
            tasks.create_task(report(run_id, number))
    if any(stream.lost for stream in streams):
        raise RuntimeError("a tab's stream was cut off")
    for stream in streams:
        stream.close()
    return result.result()


async def _stream(port: int, token: str, run_id: str) -> Reader:
    """The events of a run from now on."""
    control = await Connection.open(port)
    known = json.loads(await control.ask(get(f"/v1/runs/{run_id}", token)))
    control.close()
    return await follow(port, token, run_id, known["events"])


def _moments(first: float, seconds: float, end: float) -> Iterator[float]:
    while first < end:
        yield first
        first += seconds


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def one_round() -> dict[str, Any]:
    """Everything, once, with a database and a service of its own."""
    with tempfile.TemporaryDirectory() as home:
        seed = service_seed.make(Path(home), RUNS)
        began = machine_and_own()
        with served(Path(home)) as (port, process):
            measured = asyncio.run(tabs(port, process, seed))
        return {**measured, "others_share": others_share(began, machine_and_own())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["round"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(one_round()))
        return
    checkouts = {"here": ROOT.parent} | ({"against": arguments.against.resolve()} if arguments.against else {})
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for turn in range(arguments.rounds):
        for name, checkout in checkouts.items():
            rounds[name].append(run_arm(__spec__.name, "round", checkout=checkout))
            print(f"round {turn + 1}/{arguments.rounds} {name}: {json.dumps(rounds[name][-1])}", file=sys.stderr)
    write_result(
        "service_tabs",
        {
            **environment("python -m benchmarks.service_tabs", "service"),
            "setting": {
                "runs": RUNS,
                "tabs": TABS,
                "events_per_minute": EVENTS_PER_MINUTE,
                "seconds": SECONDS,
                "seconds_between": {"list": LIST, "run": RUN, "pools": POOLS, "report": REPORT},
                "rounds": arguments.rounds,
            },
            "targets": TARGETS,
            "commits": {name: commit_of(checkout) for name, checkout in checkouts.items()},
            **{name: combined(each) for name, each in rounds.items()},
        },
    )


if __name__ == "__main__":
    main()
