"""A driver that ends as with its machine, in the middle of a sub-model: `dying_driver.py CONFIG UNIT STEP`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from moedisco_ray.core.config import check_config
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


def main(config: str, unit: str, step: str) -> None:
    """Drive a run until a unit has made a step, and kill this process."""

    def listen(event: Event) -> None:
        if event.type == "progress" and event.unit == unit and event.data["step"] >= int(step):
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.run(check_config(json.loads(Path(config).read_text())), (listen,), backend=LocalBackend())


if __name__ == "__main__":
    main(*sys.argv[1:])
