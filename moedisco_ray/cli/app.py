"""The command line. Arguments are parsed and checked first; what is heavy is imported when it is sure to be needed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from moedisco_ray import __version__
from moedisco_ray.cli.display import View, cluster_view, evaluation_view, listener_for, plan_view, report_view
from moedisco_ray.cli.trackers import trackers
from moedisco_ray.core.config import Evaluation, RunConfig, Source, check_evaluation, load_config, tokenizer_files
from moedisco_ray.core.config.presets import PresetName, local_gpus, preset_text
from moedisco_ray.core.errors import ConfigError, MoeDiscoError, RunStopped, UserError
from moedisco_ray.core.records import EvaluationRecord
from moedisco_ray.core.run_report import current_report
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.plan import build_plan
from moedisco_ray.plan.cluster_file import disagreements, load_cluster
from moedisco_ray.plan.machine import known_machine, measured_machine

_USER_ERROR, _RUN_ERROR, _STOPPED, INTERRUPTED = 2, 1, 3, 130
_PIPE_WIDTH = 120


class Commands(TyperGroup):
    """Ends every command's errors the same way: one line, and a code that says whose mistake it was."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's context is click's
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            _complain(str(error))
            raise typer.Exit(_USER_ERROR) from error
        except RunStopped as error:
            _complain(str(error))
            raise typer.Exit(_STOPPED) from error
        except MoeDiscoError as error:
            _complain(" ".join(str(error).split()))
            raise typer.Exit(_RUN_ERROR) from error
        except KeyboardInterrupt as error:
            _complain("interrupted; the same command goes on from the last checkpoint")
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Commands, add_completion=False, pretty_exceptions_enable=False,
    help="Train Mixture-of-Experts language models mostly on cheap, low-memory GPUs, on Ray.")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML or JSON file; `moedisco init` writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as tokens.total=1000000."),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Hold the pools against what this file for `ray up` starts."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON, for programs.")]
NewFile = Annotated[Path, typer.Argument(metavar="[PATH]", help="Where to write; - is the standard output.")]
Redo = Annotated[bool, typer.Option("--redo", help="Make again what changed settings affect, in the same directory.")]
StopPath = Annotated[
    Path | None, typer.Option("--stop-file", metavar="PATH", help="End with a checkpoint, and code 3, once this file exists."),
]
ReportTo = Annotated[
    str | None, typer.Option("--report-to", metavar="URL", help="Report to a control service, with the token MOEDISCO_RUN_TOKEN."),
]
RunId = Annotated[str | None, typer.Option(
    "--run-id", metavar="ID", help="The run's id in experiment trackers, where it has none yet; left out: a random one.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The directory of a run: OUTPUT/NAME.")]

TaskFiles = Annotated[
    list[Path] | None, typer.Option("--lm-eval", metavar="FILE", help="A task file for lm-eval; repeat for more."),
]
UnseenText = Annotated[
    list[str] | None, typer.Option("--sources", metavar="PATH", help="Text that it was not trained on; repeat for more."),
]
ModelDir = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A model that a run exported: OUTPUT/NAME/model.")]


def main() -> None:
    """Run the command line."""
    app(prog_name="moedisco")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moedisco {__version__}")
        raise typer.Exit


@app.callback(no_args_is_help=True)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


@app.command()
def run(
    config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False,
    redo: Redo = False, stop_file: StopPath = None, report_to: ReportTo = None, run_id: RunId = None,
) -> None:
    """Carry out a run, or go on with one that was interrupted."""
    checked = load_config(config, overrides or ())
    # Planning finds a vocabulary that does not fit the model before anything is started.
    planned = build_plan(checked, known_machine(checked, here="RAY_ADDRESS" not in os.environ, read_sizes=True))
    console = output_console()
    stop = StopFile(stop_file)
    with contextlib.ExitStack() as stack:
        views: list[View] = [listener_for(console, as_json, checked, planned), *trackers(checked)]
        if report_to is not None:
            views.append(_reporter(report_to, checked, stop))
        for view in views:
            stack.callback(view.close)
        pipeline = _import_late("moedisco_ray.execution.pipeline")
        directory: Path = pipeline.run(checked, tuple(views), redo, stop=stop, given_id=run_id)
    if not as_json:
        console.print()
        console.print(report_view(current_report(directory)))
        console.print(f"\nThe model is in {directory / 'model'}", soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath, overrides: Overrides = None, cluster: ClusterFile = None, as_json: AsJson = False,
) -> None:
    """Say what a run needs and costs: parameters, memory, hours, dollars."""
    checked = load_config(config, overrides or ())
    worked_out = build_plan(checked, measured_machine(checked, here="RAY_ADDRESS" not in os.environ))
    if as_json:
        print(worked_out.model_dump_json(indent=2))
    else:
        output_console().print(plan_view(worked_out))
    if cluster is not None:
        started = load_cluster(cluster)
        found = disagreements(started, checked, worked_out)
        if not as_json:
            output_console().print(cluster_view(started, str(cluster), agrees=not found))
        for each in found:
            _complain(str(each))
        if found:
            raise typer.Exit(_USER_ERROR)


@app.command()
def init(
    path: NewFile = Path("moedisco.yaml"),
    preset: Annotated[PresetName | None, typer.Option(
        help="What to start from.", show_default="default with a GPU, demo without one")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented configuration to start from: one that this machine can run, unless a preset is named."""
    chosen = preset or ("default" if local_gpus() else "demo")
    text = preset_text(chosen)
    if str(path) == "-":
        print(text, end="")
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError("PATH", str(path), "is there already; choose another, or pass --force") from error
    except OSError as error:
        raise ConfigError("PATH", str(path), f"cannot be written ({error.strerror})") from error
    if preset is None and chosen == "demo":
        print("no GPU found here: the `demo` preset runs on CPU cores; `--preset default` is for GPUs, here or on a cluster")
    print(f"wrote {path} (preset {chosen}); next: moedisco plan {path}")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Open what a configuration names, and list every mistake with which the run would fail; nothing is written."""
    checked = load_config(config, overrides or ())
    findings = _import_late("moedisco_ray.execution.validation").validate(checked)
    for problem in findings.problems:
        _complain(str(problem))
    if not findings.problems:
        print(
            f"ok: {checked.name}, {checked.model.family} with {checked.model.architecture.num_experts} experts and "
            f"{findings.vocab_size:,} tokens of vocabulary, {checked.clusters.count} clusters, {checked.tokens.total:,} tokens")
    for warning in findings.warnings:
        print(f"warning: {warning}")
    if findings.problems:
        raise typer.Exit(_USER_ERROR)


@app.command()
def schema() -> None:
    """Print the JSON schema of configurations."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def show(run_dir: RunDir, as_json: AsJson = False) -> None:
    """Show a run, finished or not: its table, clusters, measurements and samples."""
    report = current_report(run_dir)
    if as_json:
        print(report.model_dump_json(indent=2, exclude_unset=True))
    else:
        output_console().print(report_view(report))


@app.command()
def plot(run_dir: RunDir) -> None:
    """Draw a run's loss curves, clusters and expert load into RUN_DIR/figures."""
    paths = _import_late("moedisco_ray.cli.figures").plot(current_report(run_dir), run_dir / "figures")
    for path in paths:
        print(path)
    if not paths:
        print(f"nothing to draw yet: {run_dir} has no loss curve and no clusters so far")


@app.command()
def evaluate(
    model_dir: ModelDir,
    lm_eval: TaskFiles = None,
    sources: UnseenText = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of text.")] = 1_000_000,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task file, the first ones; none: all.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure an exported model on text that it was never trained on, and on tasks."""
    if not lm_eval and not sources:
        raise ConfigError("--sources", None, "name text, or task files by --lm-eval: there is nothing to measure")
    if not (model_dir / "config.json").is_file() or not tokenizer_files(model_dir):
        raise ConfigError("MODEL_DIR", str(model_dir), "holds no model with its tokenizer; name what a run exported: RUN_DIR/model")
    settings = Evaluation(
        sources=tuple(Source(path=path) for path in sources or ()), lm_eval=tuple(lm_eval or ()), lm_eval_limit=limit,
        max_tokens=max_tokens)
    check_evaluation(settings)
    result = _import_late("moedisco_ray.stages.evaluate.stage").judge(
        model_dir, model_dir, settings, device=device, read_unseen=_import_late("moedisco_ray.stages.corpus.unseen").read_unseen)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        output_console().print(evaluation_view(EvaluationRecord.model_validate(result)))


def _reporter(url: str, config: RunConfig, stop: StopFile) -> View:
    token = os.environ.get("MOEDISCO_RUN_TOKEN")
    if not token:
        raise ConfigError("--report-to", url, "needs the run's token in the environment variable MOEDISCO_RUN_TOKEN")
    view: View = _import_late("moedisco_ray.cli.reporter").Reporter(url, token, config.directory / "events.jsonl", stop)
    return view


def _import_late(name: Literal[
    "moedisco_ray.execution.pipeline", "moedisco_ray.cli.figures", "moedisco_ray.cli.reporter",
    "moedisco_ray.stages.evaluate.stage", "moedisco_ray.stages.corpus.unseen", "moedisco_ray.execution.validation",
]) -> ModuleType:
    """Import a module that pulls in torch, Ray or matplotlib: seconds that `--help` or a mistake should not cost."""
    return importlib.import_module(name)


def output_console() -> Console:
    """The standard output, wide enough for tables where it is a pipe."""
    # A pipe has no width of its own, and rich would cut tables to 80 columns.
    # The stream by name: what Ray prints while a run goes on is kept off it.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _complain(line: str) -> None:
    print(f"moedisco: {line}", file=sys.stderr)
