"""The command line.

Commands check their arguments first, and import torch, Ray and matplotlib only when they need them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moedisco_ray import __version__
from moedisco_ray.cli import models
from moedisco_ray.cli.allowed_code import allowed_functions
from moedisco_ray.cli.arguments import (
    USUAL_FILE,
    AllowCode,
    AsJson,
    ClusterFile,
    ConfigPath,
    MeasuredIn,
    NoVerify,
    Overrides,
    Redo,
    Repair,
    ReportTo,
    Reuse,
    RunDir,
    RunId,
    StopPath,
)
from moedisco_ray.cli.console import output_console, remark, say, say_text
from moedisco_ray.cli.continuing import Continuation
from moedisco_ray.cli.display import View, listener_for, next_commands, report_view
from moedisco_ray.cli.doctor import doctor
from moedisco_ray.cli.init import init
from moedisco_ray.cli.tracking import trackers
from moedisco_ray.core.config import RunConfig, load_config
from moedisco_ray.core.errors import ConfigError, MoeDiscoError, RunStopped, UserError, raise_together
from moedisco_ray.core.printable import escape_output, one_line
from moedisco_ray.core.records.measurements import THIS_MACHINE, place_of
from moedisco_ray.core.records.outdated import REMEDY
from moedisco_ray.core.records.prices import PriceTag
from moedisco_ray.core.records.run_damage import damage_of, owned_damage_of
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.registry import COMMANDS, load
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.core.store.locations import is_uri, joined
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.output_checks import small_disks, unwritable_places
from moedisco_ray.execution.text_size import listed_bytes
from moedisco_ray.plan import build_plan, too_large, with_cluster_count
from moedisco_ray.plan.machine import known_machine, measured_machine

_USER_ERROR, _RUN_ERROR, _STOPPED, INTERRUPTED = 2, 1, 3, 130
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""Base class of typer's errors about arguments, which has no public name."""


class Commands(TyperGroup):
    """Prints each error as one line. Exit codes: 1 failed run, 2 user error, 3 stopped run, 130 interrupt."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line of this process, which prints no control characters from then on."""
        escape_output()
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> typer.Context:
        """Read the options that precede a command."""
        with _readable_usage_error():
            return super().make_context(*args, **kwargs)  # type: ignore[return-value]

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's context is click's
        """Run the command, and exit with a message and a code if it fails."""
        try:
            with _readable_usage_error():
                return super().invoke(ctx)
        except UserError as error:
            for mistake in (error, *error.others):
                remark(_with_notes(str(mistake), mistake))
            raise typer.Exit(_USER_ERROR) from error
        except RunStopped as error:
            remark(_with_notes(str(error), error))
            raise typer.Exit(_STOPPED) from error
        except MoeDiscoError as error:
            remark(" ".join(str(error).split()))
            raise typer.Exit(_RUN_ERROR) from error
        except KeyboardInterrupt as error:
            remark(_with_notes("interrupted", error))
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train Mixture-of-Experts language models mostly on cheap, low-memory GPUs, on Ray.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="moedisco")


@contextlib.contextmanager
def _readable_usage_error() -> Iterator[None]:
    """Escape control characters in typer's errors, which typer prints with a console of its own."""
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = one_line(error.message)  # type: ignore[attr-defined]
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"moedisco {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Handle the options that precede a command."""


@app.command()
def run(
    config: ConfigPath = USUAL_FILE,
    overrides: Overrides = None,
    as_json: AsJson = False,
    redo: Redo = False,
    reuse: Reuse = None,
    repair: Repair = False,
    no_verify: NoVerify = False,
    allow_code: AllowCode = None,
    stop_file: StopPath = None,
    report_to: ReportTo = None,
    run_id: RunId = None,
) -> None:
    """Train a model, or continue a run that was interrupted."""
    if report_to is not None:
        from moedisco_ray.cli.driver_secrets import receive_secrets

        receive_secrets(report_to)
    checked = load_config(config, overrides or ())
    _check_secrets(checked)
    functions = allowed_functions(checked, config.parent, allow_code or ())
    # Plan first, so that a vocabulary that does not fit the model is reported before anything starts.
    planned = build_plan(checked, known_machine(checked, here="RAY_ADDRESS" not in os.environ, listed=listed_bytes))
    raise_together((*unwritable_places(checked), *small_disks(checked, planned)))
    console = output_console()
    stop, prices = StopFile(stop_file), PriceTag(checked.pools)
    with contextlib.ExitStack() as stack:
        views: list[View] = [listener_for(console, as_json, checked, planned), *trackers(checked)]
        if report_to is not None:
            views.append(_reporter(report_to, checked, stop, prices))
        continuation = Continuation(redo, stop)
        views.append(continuation)
        for view in views:
            stack.callback(view.close)
        stack.enter_context(continuation.noted())
        from moedisco_ray.execution.pipeline import run as run_pipeline

        directory = run_pipeline(
            checked,
            tuple(views),
            redo,
            stop=stop,
            given_id=run_id,
            functions=functions,
            prices=prices,
            verifies=not no_verify,
            repairs=repair,
            ways=planned.alternatives,
            reuses=[each if is_uri(each) else Path(each).absolute() for each in reuse or ()],
            lenient=report_to is not None,  # a service offers runs that may be deleted by now
        )
    if not as_json:
        console.print()
        place = checked.location if is_uri(checked.location) else directory
        report = current_report(place)
        console.print(report_view(report))
        console.print(f"\nThe model is in {joined(place, 'model')}", soft_wrap=True)
        console.print(next_commands(place, report), soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath = USUAL_FILE,
    overrides: Overrides = None,
    cluster: ClusterFile = None,
    measured: MeasuredIn = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run needs, and whether another way costs less; exit code 2 if it does not fit."""
    checked = load_config(config, overrides or ())
    machine = measured_machine(checked, here="RAY_ADDRESS" not in os.environ, listed=listed_bytes)
    if measured is not None:
        from moedisco_ray.plan.measured_speed import with_measured_speed

        checked, pools = with_measured_speed(checked, measured)
        words = dict.fromkeys(pools, f"in {measured}")
    elif cluster is not None and place_of() == THIS_MACHINE:
        words = {}  # the machines of the file are others
    else:
        from moedisco_ray.plan.measured_machines import with_stored_measurements

        checked, words = with_stored_measurements(checked, place_of())
    machine = machine.model_copy(update={"measured": words})
    worked_out = build_plan(checked, machine)
    if as_json:
        say_text(worked_out.model_dump_json(indent=2))
    else:
        from moedisco_ray.cli.display.plan import plan_view

        output_console().print(plan_view(worked_out))
    problems: list[object] = [stage.problem for stage in too_large(worked_out)]
    if cluster is not None:
        from moedisco_ray.cli.display.cluster import cluster_view
        from moedisco_ray.plan.capacity import cluster_needs, lacking
        from moedisco_ray.plan.cluster_checks import disagreements
        from moedisco_ray.plan.cluster_file import load_cluster

        started = load_cluster(cluster)
        found = (*disagreements(started, checked, worked_out), *lacking(started, checked, worked_out))
        problems += found
        if not as_json:
            output_console().print(
                cluster_view(started, cluster_needs(started, checked, worked_out), str(cluster), agrees=not found)
            )
    for each in problems:
        remark(str(each))
    if problems:
        raise typer.Exit(_USER_ERROR)


@app.command()
def validate(config: ConfigPath = USUAL_FILE, overrides: Overrides = None) -> None:
    """Check a configuration and the files that it names, and list every mistake; nothing is left behind."""
    checked = with_cluster_count(load_config(config, overrides or ()))
    from moedisco_ray.execution.validation import validate as find_problems

    findings = find_problems(checked, config.parent)
    for problem in findings.problems:
        remark(str(problem))
    if not findings.problems:
        say(
            f"ok: {checked.name}, {checked.model.family_name} with {checked.model.architecture.num_experts} experts "
            f"and {findings.vocab_size:,} tokens of vocabulary, {checked.cluster_count} clusters, "
            f"{checked.tokens.total:,} tokens"
        )
    for warning in findings.warnings:
        say(f"warning: {warning}")
    if findings.problems:
        raise typer.Exit(_USER_ERROR)


@app.command()
def schema() -> None:
    """Print the JSON schema of configurations."""
    say_text(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def show(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show a run, finished or not: stages, clusters, evaluation, samples."""
    report = current_report(run_dir)
    if as_json:
        say_text(report.model_dump_json(indent=2, exclude_unset=True))
    else:
        console = output_console()
        console.print(report_view(report))
        if report.samples:  # the last stage is done
            console.print()
            console.print(next_commands(run_dir, report), soft_wrap=True)


@app.command()
def verify(
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN_DIR", help="Directory or URI of a run, or the directory of an exported model.")
    ],
) -> None:
    """Read all files of a run, finished or not, and list those that are damaged; exit code 1 if any is."""
    is_damaged = False
    for part in itertools.chain(damage_of(run_dir), owned_damage_of(run_dir)):
        say(str(part))
        is_damaged |= bool(part.damaged)
    if is_damaged:
        raise typer.Exit(_RUN_ERROR)


@app.command()
def plot(run_dir: RunDir) -> None:
    """Draw a run's loss curves, clusters and expert load into RUN_DIR/figures."""
    report = current_report(run_dir)
    from moedisco_ray.cli.figures import plot as draw

    store = RunStore.of(run_dir)
    paths = draw(report, store.directory / "figures")
    store.publish(*paths)
    for path in paths:
        say(str(path))
    for stage in report.stages:
        if stage.outdated:
            print(
                f"warning: stage {stage.name} is out of date, and so is what the figures show of it; {REMEDY}",
                file=sys.stderr,
            )
    if not paths:
        say(f"nothing to draw yet: {run_dir} has no loss curve and no clusters so far")


for command in (init, doctor, models.export, models.push, models.chat, models.evaluate):
    app.command()(command)
for entry in COMMANDS:
    app.registered_commands += load(entry).registered_commands


def _check_secrets(config: RunConfig) -> None:
    for name in config.secrets:
        if not os.environ.get(name):
            raise ConfigError("secrets", name, "is not set; set this environment variable where the run starts")


def _reporter(address: Path, config: RunConfig, stop: StopFile, prices: PriceTag) -> View:
    from moedisco_ray.cli.reporter import Reporter

    return Reporter(address, config.directory / "events.jsonl", stop, prices.change)


def _with_notes(message: str, error: BaseException) -> str:
    return "; ".join([message, *getattr(error, "__notes__", ())])
