import json
import subprocess
import sys

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
