import json
import logging
import subprocess
import sys

import pytest

from service.observability import Repeated
from service.settings import Settings

SCRIPT = """
import logging
from service.observability import bound, configure_logging, logger
configure_logging({form!r})
with bound(request_id="r-1", run_id="RUN"):
    logger("service.x").info("hello", answer=42)
    logging.getLogger("uvicorn.error").warning("from %s", "a library")
    try:
        1 / 0
    except ZeroDivisionError:
        logger("service.x").exception("it broke")
logging.getLogger("httpx").info("not shown")
logging.getLogger("uvicorn.access").info("not shown either")
"""


def lines(form):
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(form=form)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json_logs_are_a_document_a_line_with_ids():
    hello, library, broke = (json.loads(line) for line in lines("json"))
    assert (hello["event"], hello["answer"], hello["level"], hello["logger"]) == ("hello", 42, "info", "service.x")
    assert library["event"] == "from a library"
    assert "ZeroDivisionError" in broke["exception"]
    assert {(line["request_id"], line["run_id"]) for line in (hello, library, broke)} == {("r-1", "RUN")}
    assert hello["timestamp"].endswith("Z")


def test_console_logs_are_for_people():
    text = "\n".join(lines("console"))
    for word in ("hello", "from a library", "it broke", "run_id=RUN", "ZeroDivisionError"):
        assert word in text


FAILING = """
import contextlib, sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
import httpx
from api_client import service
from running_service import Running
from service.api import security
from service.background.loop import Loop
from service.observability import configure_logging

def fail(*_):
    raise RuntimeError("a bug")

def work(_):
    bearer = {token!r}
    fail(bearer)

configure_logging({form!r})
with service(Path({home!r})) as made:
    running = Running(made)
    running.start()
    security.tokens.find = fail
    loop = Loop(work, 0.001, "reconciler")
    loop.start()
    try:
        with httpx.Client(headers={{"Authorization": "Bearer " + {token!r}, "Connection": "close"}}) as client:
            for _ in range(20):
                # The server closes the connection of a failed request.
                with contextlib.suppress(httpx.TransportError):
                    client.get(running.url + "/v1/runs")
        time.sleep(0.3)
    finally:
        loop.stop()
        running.stop()
"""


def test_what_fails_again_and_again_writes_no_secret_and_little(tmp_path):
    """A request handler and a loop fail hundreds of times, with a bearer token in a local variable.

    Before (af276e38): the JSON log has 229 kB; the console still writes tracebacks with all local variables after a
    minute.
    """
    token = "mdk_" + "S3cr3t" * 7
    script = FAILING.format(paths=sys.path, home=str(tmp_path), form="json", token=token)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "a bug" in done.stderr
    assert "reconciler failed" in done.stderr
    assert "S3cr3t" not in done.stderr
    requests = sum("status=500" in line or '"status": 500' in line for line in done.stderr.splitlines())
    assert requests == 20  # each request is logged; the rest of the log is small
    assert len(done.stderr) < 400 * requests + 30_000


def test_an_exception_that_repeats_is_counted_with_growing_pauses():
    now = 0.0
    repeated = Repeated(lambda: now)

    def log(seconds):
        nonlocal now
        now += seconds
        try:
            {}["stage"]
        except KeyError:
            record = logging.LogRecord("service.x", logging.ERROR, __file__, 1, "it failed", (), sys.exc_info())
        return record.getMessage() if repeated.filter(record) else None

    assert [log(seconds) for seconds in (0, 20, 20, 30, 100, 30, 4000)] == [
        "it failed",
        None,
        None,
        "it failed (again, 3 times: KeyError)",
        None,
        "it failed (again, 2 times: KeyError)",
        "it failed",
    ]


def test_settings_print_no_password_of_the_database(tmp_path):
    """Before (af276e38): the password is in the text of the settings."""
    made = Settings(state_dir=tmp_path, database_url="postgresql+psycopg://u:s3cr3t@h/d")
    assert "s3cr3t" not in f"{made} {made!r} {made.model_dump()} {made.model_dump_json()}"
    assert made.database == "postgresql+psycopg://u:s3cr3t@h/d"


HOSTILE_SCRIPT = r"""
import logging
from service.observability import bound, configure_logging, logger
configure_logging({form!r})
text = "run x\x1b[2J\x1b]52;c;eA==\x07\x9b\u202e\u2028" + "\nforged line"
with bound(run_id=text):
    logger("service.x").info(text, **{{"key": text, text.replace("\n", " "): 1}})
    logging.getLogger("uvicorn.error").warning("from %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        logger("service.x").exception("it broke")
"""


@pytest.mark.parametrize("form", ["console", "json"])
def test_a_log_shows_what_a_terminal_would_obey_and_begins_no_line_for_it(form):
    """Before (af276e38): the console form wrote ESC, OSC 52 and C1 of a run's name, and a line that the name began."""
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE_SCRIPT.format(form=form)], capture_output=True, text=True, check=True
    )
    for character in "\x1b\x07\x9b\u202e\u2028":
        assert character not in done.stderr
    assert "\\u001b[2J" in done.stderr
    first, second, *rest = done.stderr.split("\n")
    assert "forged line" in first
    assert "from run x" in second
    assert "forged line" in second
    assert any("it broke" in line for line in rest)
