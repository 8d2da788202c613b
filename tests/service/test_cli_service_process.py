"""The command line as processes, against the real application."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import api_client
import pytest
from running_service import Running

from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.events import Event
from service.domain.states import RunState

STAGES = ["corpus", "submodels"]


@pytest.fixture
def running(tmp_path):
    with api_client.service(tmp_path) as made:
        running = Running(made)
        running.start()
        yield running
        running.stop()


class Commands:
    """Runs `moedisco` in a directory, as a user of the service."""

    def __init__(self, running, directory):
        self.directory = directory
        self.named = f"moedisco: the service at {running.url} (MOEDISCO_URL)\n"
        self.environment = os.environ | {
            "MOEDISCO_URL": running.url,
            "MOEDISCO_TOKEN": running.made.plain["ann"],
            "TERM": "xterm",
        }

    def start(self, *arguments, **options):
        return subprocess.Popen(
            [sys.executable, "-c", "from service.cli import main; main()", *arguments],
            cwd=self.directory,
            env=self.environment,
            **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options),
        )

    def run(self, *arguments):
        process = self.start(*arguments)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def moedisco(running, tmp_path):
    (tmp_path / "demo.yaml").write_text(preset_text("demo"))
    return Commands(running, tmp_path)


def begin(running, run_id):
    running.made.start(run_id)
    running.made.report(
        run_id,
        Event("run_started", data={"name": "demo", "directory": "/runs/demo", "stages": STAGES}),
        Event("stage_started", "corpus"),
    )


@pytest.mark.slow
def test_a_run_from_submission_to_its_end(running, moedisco):
    code, out, err = moedisco.run("submit", "demo.yaml", "--json")
    assert (code, err) == (0, moedisco.named)
    run_id = json.loads(out)["id"]
    code, out, _ = moedisco.run("status", run_id[:20])
    assert code == 0
    assert "queued (#1)" in out
    watching = moedisco.start("watch", "demo")
    begin(running, run_id)
    running.stop()
    running.start()
    running.made.bring(run_id, RunState.FAILED)
    out, err = watching.communicate(timeout=60)
    assert watching.returncode == 1
    assert re.sub(r"\d\d:\d\d:\d\d  ", "", out).splitlines() == [
        "queued",
        "starting",
        "running",
        "run demo in /runs/demo",
        "corpus: started",
        "failed",
    ]
    assert err == f"{moedisco.named}moedisco: run demo failed: no reason is known\n"
    assert moedisco.run("resume", "demo")[0] == 0
    assert moedisco.run("cancel", "demo")[1] == f"{run_id}  demo: cancelled\n"
    assert moedisco.run("delete", "demo")[1] == f"{run_id}  demo: deleted\n"
    code, _, err = moedisco.run("status", "demo")
    assert (code, err) == (2, f"{moedisco.named}moedisco: RUN: 'demo': no such run; `moedisco list` shows your runs\n")


@pytest.mark.slow
def test_ctrl_c_leaves_the_run(running, moedisco):
    run_id = running.made.submit()["id"]
    begin(running, run_id)
    (running.made.directory(run_id) / "ray.log").write_text("a line\n")
    looking = moedisco.start("watch", run_id)
    assert looking.stdout.readline()
    looking.send_signal(signal.SIGINT)
    _, err = looking.communicate(timeout=60)
    assert looking.returncode == 130
    assert err == f"{moedisco.named}moedisco: the run continues: moedisco watch {run_id}\n"
    assert json.loads(moedisco.run("status", run_id, "--json")[1])["state"] == "running"


@pytest.mark.slow
def test_a_terminal_shows_the_live_view(running, moedisco):
    run_id = running.made.submit()["id"]
    begin(running, run_id)
    running.made.report(run_id, Event("stage_finished", "corpus", data={"seconds": 2.0}))
    running.report(run_id, 1, 3)
    running.made.bring(run_id, RunState.FAILED)
    ours, theirs = pty.openpty()
    watching = moedisco.start("watch", run_id, stdout=theirs)
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert watching.wait(60) == 1
    watching.stderr.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "queued" in text
    assert "✓ corpus" in text
    assert "loss 3.000" in text
    assert "\x1b[?25h" in shown.decode()  # the cursor is back
