"""`moedisco doctor`: examine the machines that a run would use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moedisco_ray.cli.arguments import AsJson, Overrides
from moedisco_ray.cli.console import say, say_text
from moedisco_ray.core.config import RunConfig, check_config, load_config
from moedisco_ray.core.config.presets import local_gpus, preset_text
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.core.records.measurements import (
    THIS_MACHINE,
    Check,
    Measurements,
    measurements_path,
    place_of,
    store_measurements,
)

if TYPE_CHECKING:
    from moedisco_ray.execution.doctor.work import Work

_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED ", "skipped": "skipped"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Configuration whose pools are examined.", show_default="this machine"),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Examine cards, kernels, memory, speed, network, storage and resuming before a run; exit code 2 on failure."""
    checked = _built_in() if config is None else load_config(config, overrides or ())
    from moedisco_ray.execution.doctor.work import work_of

    found = _examined(checked, work_of(checked, configured=config is not None), quiet=as_json)
    try:
        kept = f"plans use what is in {store_measurements(found)}"
    except OSError as error:
        kept = f"the measurements cannot be kept ({error.strerror}): let MOEDISCO_CACHE_DIR name a folder for them"
    if as_json:
        say_text(found.model_dump_json(indent=2))
    else:
        failed, of = len(found.failures), f"{len(found.slots)} slots in {found.seconds:.0f} s"
        say(f"{f'{failed} checks failed' if failed else 'no check failed'}, {of}; {kept}")
    if found.failures:
        raise typer.Exit(2)


def _examined(config: RunConfig, work: Work, *, quiet: bool) -> Measurements:
    show = (lambda _name, _checks: None) if quiet else _show
    place = place_of()
    if place == THIS_MACHINE:
        from moedisco_ray.execution.doctor.here import examine_here

        return examine_here(config, work, show)
    from moedisco_ray.execution.ray.examined_slots import examine_cluster

    return examine_cluster(work, place, measurements_path(place).with_suffix(".log"), show)


def _built_in() -> RunConfig:
    """A small model, on this machine's cards if it has any."""
    raw = parse_yaml(preset_text("demo"))
    for pool in raw["pools"].values():
        pool["gpu"] = min(1, local_gpus())
    return check_config(raw)


def _show(name: str, checks: Sequence[Check]) -> None:
    """Print one line per check, below the name of what was tried."""
    say(name)
    for check in checks:
        remedy = "" if check.remedy is None else f"; {check.remedy}"
        say(f"  {_MARKS[check.state]}  {check.part:<7}  {check.name}: {check.found}{remedy}")
