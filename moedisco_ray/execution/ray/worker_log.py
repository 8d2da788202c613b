"""A log file per training worker in the run directory: it outlives the node, and can be followed from anywhere."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray

from moedisco_ray.core.events import Emit, Event
from moedisco_ray.training import TrainJob, World

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@contextlib.contextmanager
def worker_log(job: TrainJob, world: World, emit: Emit) -> Iterator[Emit]:
    """Write what a worker goes through, and its warnings and errors, to LOGS/NAME.RANK.log.

    Yields:
        `emit`, which notes progress on its way.
    """
    if job.logs is None:
        yield emit
        return
    job.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(job.logs / f"{job.name}.{world.rank}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(capture=True)
    log = logging.getLogger(f"moedisco.{job.name}")
    log.setLevel(logging.INFO)

    def noted(event: Event) -> None:
        if event.type == "progress":
            data = event.data
            log.info(
                "step %d of %d, loss %.4f, learning rate %.3g, %.0f tokens/s",
                data["step"], data["steps"], data["loss"], data["lr"], data["tokens_per_second"])
        emit(event)

    try:
        log.info(
            "%s: worker %d of %d on %s, process %d, %s",
            job.name, world.rank, world.size, ray.util.get_node_ip_address(), os.getpid(), world.device)
        yield noted
        log.info("ended")
    except BaseException:
        log.exception("died")
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
