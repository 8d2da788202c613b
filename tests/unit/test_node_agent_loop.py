"""The agent's loop: it drains each node once, also while services start, and continues."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from metadata_standin import AwsStandin, hangs, serving

from moedisco_ray.execution.node_agent import Drainer, Notice, RayUnavailable, Unavailable, make_provider, watch
from moedisco_ray.execution.node_agent.raylets import Raylet, local_raylets, run_drain

END = Notice("end", 2e9, "it goes")
ONE, TWO = Raylet("a" * 56, "10.0.0.1:6379"), Raylet("b" * 56, "10.0.0.1:6379")


class Script:
    """A provider that announces what a list says, then stops the loop."""

    name = "aws"

    def __init__(self, *notices: Notice | Exception | None) -> None:
        self.notices = list(notices)
        self.stop = threading.Event()

    def recognised(self) -> bool:
        return True

    def poll(self, max_wait: float) -> Notice | None:
        found = self.notices.pop(0)
        if not self.notices:
            self.stop.set()
        if isinstance(found, Exception):
            raise found
        return found


def run(script: Script, drain: Callable[[Notice], Sequence[str]], **options: bool) -> list[str]:
    said: list[str] = []
    watch(script, drain, interval=0.001, stop=script.stop, log=said.append, **options)
    return said


def drainer(*found: list[Raylet], fails: int = 0) -> tuple[Drainer, list[str]]:
    """A drainer of scripted raylets whose first `fails` drains meet a Ray that is not up."""
    finds, drained, left = list(found), [], [fails]

    def drain(raylet: Raylet, notice: Notice) -> None:
        if left[0]:
            left[0] -= 1
            raise RayUnavailable("not up")
        drained.append(raylet.node_id)

    return Drainer(find=lambda _only: finds.pop(0) if len(finds) > 1 else finds[0], run=drain), drained


def test_a_notice_drains_once_however_often_it_is_seen() -> None:
    drain, drained = drainer([ONE])
    said = run(Script(None, END, END, END), drain)
    assert drained == [ONE.node_id]
    assert sum("drained Ray node" in line for line in said) == 1


def test_all_nodes_of_the_machine_are_drained() -> None:
    drain, drained = drainer([ONE, TWO])
    run(Script(END), drain)
    assert drained == [ONE.node_id, TWO.node_id]


def test_a_ray_that_is_not_up_yet_is_drained_when_it_is() -> None:
    drain, drained = drainer([], [], [ONE], fails=2)
    said = run(Script(*[END] * 6), drain)
    assert drained == [ONE.node_id]
    assert [line for line in said if "not drained yet" in line] == [
        "not drained yet: no Ray node runs on this machine",
        "not drained yet: not up",
    ]


def test_a_node_that_cannot_be_drained_does_not_keep_the_others() -> None:
    drain, drained = drainer([ONE, TWO], fails=1)
    run(Script(END, END), drain)
    assert sorted(drained) == [ONE.node_id, TWO.node_id]


def test_a_ray_that_is_started_anew_on_a_machine_that_goes_is_drained_too() -> None:
    drain, drained = drainer([ONE], [TWO])
    run(Script(END, END), drain)
    assert drained == [ONE.node_id, TWO.node_id]


def test_a_risk_is_told_and_left_alone_unless_asked() -> None:
    risk = Notice("risk", 0.0, "EC2 rebalance recommendation")
    drain, drained = drainer([ONE])
    assert "EC2 rebalance recommendation; nothing is done about it" in run(Script(risk), drain)
    assert not drained
    run(Script(risk), drain, leave_on_risk=True)
    assert drained == [ONE.node_id]


def test_a_service_that_is_away_is_asked_again_and_told_of_once() -> None:
    drain, drained = drainer([ONE])
    said = run(Script(Unavailable("why"), Unavailable("why"), END), drain)
    assert said[1:2] == ["no answer from the metadata service: why"]
    assert len(said) == 3
    assert drained


def test_the_loop_hears_a_real_service_after_trouble_and_an_expired_token() -> None:
    standin, stop, said = AwsStandin(), threading.Event(), []
    drain, drained = drainer([ONE])

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("no answer"):
            standin.trouble = lambda _handler: False
        if line == "nothing is announced":
            standin.expire()
            standin.interrupt(action="terminate", time="2033-05-18T03:33:20Z")
        if "drained Ray node" in line:
            stop.set()

    with serving(standin):
        standin.trouble = hangs(standin)
        watch(make_provider("aws", standin.url), drain, interval=0.01, stop=stop, log=say)
    assert drained == [ONE.node_id]


def test_stopping_takes_no_longer_than_an_interval() -> None:
    standin, stop = AwsStandin(), threading.Event()
    drain, _ = drainer([ONE])
    with serving(standin):

        def say(line: str) -> None:
            if line == "nothing is announced":
                threading.Timer(0.1, stop.set).start()

        began = time.monotonic()
        watch(make_provider("aws", standin.url), drain, interval=30.0, stop=stop, log=say)
    assert time.monotonic() - began < 10


def test_raylets_are_found_by_their_command_line(tmp_path: Path) -> None:
    program = tmp_path / "raylet"
    program.symlink_to(Path(sys.executable).resolve())
    waits = [
        "-c",
        "import sys; print(flush=True); sys.stdin.read()",
        "--node_id=" + "c" * 56,
        "--gcs-address=127.0.0.1:1",
    ]
    with subprocess.Popen([program, *waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            assert local_raylets("c" * 56) == [Raylet("c" * 56, "127.0.0.1:1")]
            assert local_raylets("d" * 56) == []
        finally:
            process.communicate(timeout=30)


def test_a_cluster_that_is_gone_is_ray_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moedisco_ray.execution.node_agent.raylets.DRAIN_SECONDS", 3.0)
    began = time.monotonic()
    with pytest.raises(RayUnavailable, match=r"127\.0\.0\.1:1"):
        run_drain(Raylet("c" * 56, "127.0.0.1:1"), END)
    assert time.monotonic() - began < 20


def test_the_agent_does_not_import_ray_or_torch() -> None:
    script = (
        "import sys, moedisco_ray.execution.node_agent; sys.exit(bool({'ray', 'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
