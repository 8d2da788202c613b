import json
import subprocess
import sys

import pytest

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
    done = subprocess.run([sys.executable, "-c", HOSTILE_SCRIPT.format(form=form)], capture_output=True, text=True, check=True)
    for character in "\x1b\x07\x9b\u202e\u2028":
        assert character not in done.stderr
    assert "\\u001b[2J" in done.stderr
    first, second, *rest = done.stderr.split("\n")
    assert "forged line" in first
    assert "from run x" in second
    assert "forged line" in second
    assert any("it broke" in line for line in rest)
