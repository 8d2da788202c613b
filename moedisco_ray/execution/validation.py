"""`moedisco validate`: check in seconds whether a run can succeed, without creating anything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import local_gpus
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.user_code import user_functions
from moedisco_ray.execution.local_gpus import lacking_gpus
from moedisco_ray.execution.output_checks import small_disks, tight_disks, unwritable_places
from moedisco_ray.execution.text_size import listed_bytes
from moedisco_ray.plan import build_plan, readings
from moedisco_ray.plan.machine import known_machine
from moedisco_ray.stages.corpus import probe
from moedisco_ray.stages.start import start_problems

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Findings:
    """Results of a validation.

    Attributes:
        problems: Errors that would fail the run, in the order in which the run would raise them.
        warnings: Problems that would not fail the run; one line each.
        vocab_size: Number of rows of the embedding; None if unknown.
    """

    problems: tuple[UserError, ...]
    warnings: tuple[str, ...]
    vocab_size: int | None


def validate(config: RunConfig, folder: Path = Path()) -> Findings:
    """Check that a configuration's files exist and are consistent, and that the model fits its pools.

    It reads the first documents of each source, builds the model on the meta device, compares its tensors with the
    headers of the checkpoint files, and checks that the output can be written and has room. It leaves nothing behind.
    It finds the functions that the configuration names, and neither imports nor calls them.

    Args:
        config: The configuration.
        folder: Folder of the configuration's file, whose modules it may name.
    """
    problems: list[UserError] = []
    text = _collect(problems, lambda: probe(config))
    if text is not None:
        problems += text.problems
    functions = _collect(problems, lambda: user_functions(config, folder)) or []
    plan = _collect(problems, lambda: build_plan(config, known_machine(config, here=False, listed=listed_bytes)))
    problems += start_problems(config)
    if plan is not None:
        problems += [stage.problem for stage in (*plan.stages, *plan.inference) if not stage.fits]
    problems += unwritable_places(config)
    waits = tuple(_waits(config))
    warnings = [*(text.warnings if text is not None else ()), *waits]
    if plan is not None:
        small = tuple(small_disks(config, plan))
        if waits:  # the run is for other machines, whose disks may be larger
            warnings += map(str, small)
        else:
            problems += small
        warnings += tight_disks(config, plan)
        warnings += [note for note, is_often in filter(None, [readings(plan)]) if is_often]
    warnings += [
        f"{each.field}: {each.name} was not called, so what it makes of the rows was not checked" for each in functions
    ]
    # the first problem of each setting
    first = {(problem.field, str(problem.value)): problem for problem in reversed(problems)}
    return Findings(tuple(reversed(first.values())), tuple(warnings), None if plan is None else plan.vocab_size)


def _collect(problems: list[UserError], check: Callable[[], T]) -> T | None:
    """Run a check and return its result; if it raises an error, append the error to `problems`."""
    try:
        return check()
    except UserError as error:
        problems.append(error)
        return None


def _waits(config: RunConfig) -> Iterator[str]:
    """Warn about GPUs that this machine lacks, unless RAY_ADDRESS names a Ray cluster, which may have them.

    `run` refuses such a configuration; it may have been written for another machine.
    """
    if not os.environ.get("RAY_ADDRESS"):
        yield from map(str, lacking_gpus(config, local_gpus()))
