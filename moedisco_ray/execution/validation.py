"""`moedisco validate`: everything that can be found out about a run in seconds, before anything is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import local_gpus
from moedisco_ray.core.errors import PoolError, RunDirError, UserError
from moedisco_ray.plan import Plan, build_plan
from moedisco_ray.stages.corpus import probe
from moedisco_ray.stages.start import start_problems

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a validation found.

    Attributes:
        problems: Mistakes with which the run would fail, in the order in which it would meet them.
        warnings: What the run can be carried out with, and its author should know: a line each.
        vocab_size: Rows of the embedding; None where it cannot be said.
    """

    problems: tuple[UserError, ...]
    warnings: tuple[str, ...]
    vocab_size: int | None


def validate(config: RunConfig) -> Findings:
    """Open what a configuration names, and check that it fits together and fits its pools.

    The first documents of each source are read, the model is built on the meta device against its files' headers, and the output
    is checked to be writable. Nothing is written.

    Args:
        config: A checked configuration.
    """
    problems: list[UserError] = []
    text = _collect(problems, lambda: probe(config))
    if text is not None:
        problems += text.problems
    plan = _collect(problems, lambda: build_plan(config))
    problems += start_problems(config)
    if plan is not None:
        problems += _too_large(plan, config)
    _collect(problems, lambda: check_output(config.directory))
    warnings = [*(text.warnings if text is not None else ()), *_waits(config)]
    first = {(problem.field, str(problem.value)): problem for problem in reversed(problems)}    # one of each setting
    return Findings(tuple(reversed(first.values())), tuple(warnings), None if plan is None else plan.vocab_size)


def check_output(directory: Path) -> None:
    """Check that a run directory can be made, or written where it exists, without making it.

    Raises:
        RunDirError: It cannot.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise RunDirError("output", str(directory), f"cannot be made: {existing} is not a directory; choose another output")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunDirError("output", str(directory), f"cannot be written: no permission for {existing}; choose another output")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise RunDirError("output", str(directory), f"cannot be written: {existing} is mounted read-only; choose another output")


def _collect(problems: list[UserError], check: Callable[[], T]) -> T | None:
    """Return what a check returns; what it raises joins the problems."""
    try:
        return check()
    except UserError as error:
        problems.append(error)
        return None


def _too_large(plan: Plan, config: RunConfig) -> Iterator[UserError]:
    for stage in plan.stages:
        if not stage.fits:
            pool = config.pools.at(stage.pool)
            remedy = f"; {stage.remedy}" if stage.remedy is not None else ""
            yield PoolError(
                f"pools.{stage.pool}.memory_gb", pool.memory_gb,
                f"a worker of {stage.stage} needs {stage.memory.total / 2**30:.1f} GB{remedy}")


def _waits(config: RunConfig) -> Iterator[str]:
    """What a run on this machine alone would wait for; a cluster that RAY_ADDRESS names may have it."""
    if os.environ.get("RAY_ADDRESS"):
        return
    for pool, needed in config.pools.needed(config.finetune.pool):
        if pool.gpu and local_gpus() < min(needed, pool.gpu):
            yield (
                f"pools.{pool.kind}.gpu: this machine has {local_gpus() or 'no'} GPU, and the run would wait for a node that has; "
                f"run it on a cluster (RAY_ADDRESS, or `moedisco submit`), or set pools.{pool.kind}.gpu=0")
