"""The command line. Commands check their arguments first, and import torch, Ray and matplotlib only when they need them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from moedisco_ray import __version__
from moedisco_ray.cli.display import View, cluster_view, evaluation_view, listener_for, losses_view, plan_view, report_view
from moedisco_ray.cli.trackers import trackers
from moedisco_ray.core.config import Evaluation, RunConfig, Source, check_evaluation, load_config, tokenizer_files
from moedisco_ray.core.config.presets import PresetName, local_gpus, preset_text
from moedisco_ray.core.errors import ConfigError, MoeDiscoError, RunStopped, UserError
from moedisco_ray.core.gguf_files import check_packages
from moedisco_ray.core.locations import is_uri, joined, parent
from moedisco_ray.core.records import EvaluationRecord
from moedisco_ray.core.run_models import finished_model, local_model
from moedisco_ray.core.run_report import current_report
from moedisco_ray.core.run_store import RunStore
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.plan import build_plan, with_cluster_count
from moedisco_ray.plan.capacity import cluster_needs, lacking
from moedisco_ray.plan.cluster_checks import disagreements
from moedisco_ray.plan.cluster_file import load_cluster
from moedisco_ray.plan.machine import known_machine, measured_machine

_USER_ERROR, _RUN_ERROR, _STOPPED, INTERRUPTED = 2, 1, 3, 130
_PIPE_WIDTH = 120


class Commands(TyperGroup):
    """Prints each error as one line. Exit codes: 1 failed run, 2 user error, 3 stopped run, 130 interrupt."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's context is click's
        """Run the command, and exit with a message and a code if it fails."""
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
            _complain("interrupted; the same command continues from the last checkpoint")
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
    typer.Option("--cluster", metavar="FILE", help="Check the pools against the node types of this `ray up` file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
NewFile = Annotated[Path, typer.Argument(metavar="[PATH]", help="File to write; - writes to standard output.")]
Redo = Annotated[bool, typer.Option("--redo", help="Repeat the stages that depend on changed settings.")]
StopPath = Annotated[
    Path | None, typer.Option("--stop-file", metavar="PATH", help="Once this file exists, save a checkpoint and exit with code 3."),
]
ReportTo = Annotated[
    str | None,
    typer.Option("--report-to", metavar="URL", help="Send events to this URL of a service; MOEDISCO_RUN_TOKEN holds the token."),
]
RunId = Annotated[str | None, typer.Option(
    "--run-id", metavar="ID", help="Id of a new run in experiment trackers; random by default.")]
RunDir = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="Directory or URI of a run, such as runs/NAME or s3://BUCKET/FOLDER/NAME.")]

TaskFiles = Annotated[
    list[Path] | None, typer.Option("--lm-eval", metavar="FILE", help="A task file for lm-eval; repeatable."),
]
UnseenText = Annotated[
    list[str] | None, typer.Option("--sources", metavar="PATH", help="Text that the model was not trained on; repeatable."),
]
BackboneOf = Literal["mean", "base"]
ModelDir = Annotated[
    str, typer.Argument(metavar="MODEL_DIR", help="Directory or URI of a model that a run exported: OUTPUT/NAME/model.")]


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
    """Handle the options that precede a command."""


@app.command()
def run(
    config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False,
    redo: Redo = False, stop_file: StopPath = None, report_to: ReportTo = None, run_id: RunId = None,
) -> None:
    """Train a model, or continue a run that was interrupted."""
    checked = load_config(config, overrides or ())
    # Plan first, so that a vocabulary that does not fit the model is reported before anything starts.
    planned = build_plan(checked, known_machine(checked, here="RAY_ADDRESS" not in os.environ, read_sizes=True))
    console = output_console()
    stop = StopFile(stop_file)
    with contextlib.ExitStack() as stack:
        views: list[View] = [listener_for(console, as_json, checked, planned), *trackers(checked)]
        if report_to is not None:
            views.append(_reporter(report_to, checked, stop))
        for view in views:
            stack.callback(view.close)
        from moedisco_ray.execution.pipeline import run as run_pipeline

        directory = run_pipeline(checked, tuple(views), redo, stop=stop, given_id=run_id)
    if not as_json:
        console.print()
        place = checked.location if is_uri(checked.location) else directory
        console.print(report_view(current_report(place)))
        console.print(f"\nThe model is in {joined(place, 'model')}", soft_wrap=True)


@app.command()
def plan(
    config: ConfigPath, overrides: Overrides = None, cluster: ClusterFile = None, as_json: AsJson = False,
) -> None:
    """Show what a run needs: parameters, memory, hours, dollars."""
    checked = load_config(config, overrides or ())
    worked_out = build_plan(checked, measured_machine(checked, here="RAY_ADDRESS" not in os.environ))
    if as_json:
        print(worked_out.model_dump_json(indent=2))
    else:
        output_console().print(plan_view(worked_out))
    if cluster is not None:
        started = load_cluster(cluster)
        found = (*disagreements(started, checked, worked_out), *lacking(started, checked, worked_out))
        if not as_json:
            output_console().print(
                cluster_view(started, cluster_needs(started, checked, worked_out), str(cluster), agrees=not found))
        for each in found:
            _complain(str(each))
        if found:
            raise typer.Exit(_USER_ERROR)


@app.command()
def init(
    path: NewFile = Path("moedisco.yaml"),
    preset: Annotated[PresetName | None, typer.Option(
        help="Preset to write.", show_default="default with a GPU, demo without one")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented configuration: the named preset, or a preset that this machine can run."""
    chosen = preset or ("default" if local_gpus() else "demo")
    text = preset_text(chosen)
    if str(path) == "-":
        print(text, end="")
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError("PATH", str(path), "exists already; choose another, or pass --force") from error
    except OSError as error:
        raise ConfigError("PATH", str(path), f"cannot be written ({error.strerror})") from error
    if preset is None and chosen == "demo":
        print("no GPU found here: the `demo` preset runs on CPU cores; `--preset default` is for GPUs, here or on a cluster")
    print(f"wrote {path} (preset {chosen}); next: moedisco plan {path}")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a configuration and the files that it names, and list every mistake; nothing is written."""
    checked = with_cluster_count(load_config(config, overrides or ()))
    from moedisco_ray.execution.validation import validate as find_problems

    findings = find_problems(checked)
    for problem in findings.problems:
        _complain(str(problem))
    if not findings.problems:
        print(
            f"ok: {checked.name}, {checked.model.family_name} with {checked.model.architecture.num_experts} experts and "
            f"{findings.vocab_size:,} tokens of vocabulary, {checked.cluster_count} clusters, {checked.tokens.total:,} tokens")
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
    """Show a run, finished or not: stages, clusters, evaluation, samples."""
    report = current_report(run_dir)
    if as_json:
        print(report.model_dump_json(indent=2, exclude_unset=True))
    else:
        output_console().print(report_view(report))


@app.command()
def plot(run_dir: RunDir) -> None:
    """Draw a run's loss curves, clusters and expert load into RUN_DIR/figures."""
    report = current_report(run_dir)
    from moedisco_ray.cli.figures import plot as draw

    store = RunStore.of(run_dir)
    paths = draw(report, store.directory / "figures")
    store.publish(*paths)
    for path in paths:
        print(path)
    if not paths:
        print(f"nothing to draw yet: {run_dir} has no loss curve and no clusters so far")


@app.command()
def export(
    run_dir: Annotated[str, typer.Argument(
        metavar="RUN_DIR", help="Directory or URI of a run; for GGUF also the directory of an exported model.")],
    to: Annotated[Literal["hf", "gguf"], typer.Option(
        "--to", help="Format: a Hugging Face directory, or a GGUF file for llama.cpp, Ollama and LM Studio.")] = "hf",
    output: Annotated[Path | None, typer.Option(
        "--output", metavar="PATH", help="Directory or file to write.", show_default="NAME-model or NAME.gguf, here")] = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Export the newest checkpoint of the fine-tune, finished or not.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export the model of a run, finished or not, as a Hugging Face directory or as a GGUF file."""
    name = parent(run_dir)[1]
    if to == "gguf":
        check_packages("--to", to)
        from moedisco_ray.execution.export_gguf import export_gguf

        target = output or Path(f"{name}.gguf")
        figures = export_gguf(run_dir, target, from_checkpoint=from_checkpoint)
    else:
        from moedisco_ray.execution.export_run import export_run

        target = output or Path(f"{name}-model")
        figures = export_run(run_dir, target, from_checkpoint=from_checkpoint)
    if as_json:
        print(json.dumps({"path": str(target), **figures}, indent=2))
    else:
        origin = "" if figures["step"] is None else f", from the checkpoint of step {figures['step']:,}"
        print(f"wrote {target}: {figures['parameters']:,} parameters, {figures['bytes']:,} bytes{origin}")


@app.command()
def push(
    run_dir: Annotated[str, typer.Argument(
        metavar="RUN_DIR", help="Directory or URI of a finished run, or a directory that `moedisco export` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face hub: ORG/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read the model.")] = False,
    message: Annotated[str, typer.Option("--message", metavar="TEXT", help="Message of the commit.")] = "Upload the model",
    as_json: AsJson = False,
) -> None:
    """Upload the model of a finished run to the Hugging Face hub, privately; HF_TOKEN holds the access token."""
    model = finished_model(run_dir)
    from moedisco_ray.core.hub_push import push_model

    pushed = push_model(model, repo, public=public, message=message)
    if as_json:
        print(json.dumps(dataclasses.asdict(pushed), indent=2))
    else:
        print(f"pushed {model} to {pushed.url}{' (private)' if pushed.private else ''}, commit {pushed.commit}")


@app.command()
def chat(
    run_dir: Annotated[str, typer.Argument(
        metavar="RUN_DIR", help="Directory or URI of a finished run, or the directory of an exported model.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(
        min=0, help="Sampling temperature; 0 takes the likeliest token.", show_default="the model's own")] = None,
    device: Annotated[str, typer.Option(help="Device that runs the model: cpu, cuda, or auto for a GPU if there is one.")] = "auto",
) -> None:
    """Chat with the model of a finished run; a model without a chat template continues text."""
    model = finished_model(run_dir)
    from moedisco_ray.cli.chat import chat as start_chat

    start_chat(model, device=device, max_tokens=max_tokens, temperature=temperature)


@app.command()
def evaluate(
    model_dir: ModelDir,
    lm_eval: TaskFiles = None,
    sources: UnseenText = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of text tokens.")] = 1_000_000,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of examples per task file, from its start.")] = None,
    device: Annotated[str, typer.Option(help="Device that runs the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Evaluate an exported model on text that it was not trained on, and on lm-eval tasks."""
    if not lm_eval and not sources:
        raise ConfigError("--sources", None, "nothing to evaluate; name text, or task files with --lm-eval")
    model = local_model("MODEL_DIR", model_dir)
    if not (model / "config.json").is_file() or not tokenizer_files(model):
        raise ConfigError("MODEL_DIR", model_dir, "holds no model and tokenizer; name a run's export: RUN_DIR/model")
    settings = Evaluation(
        sources=tuple(Source(path=path) for path in sources or ()), lm_eval=tuple(lm_eval or ()), lm_eval_limit=limit,
        max_tokens=max_tokens)
    check_evaluation(settings)
    from moedisco_ray.stages.corpus.unseen import read_unseen
    from moedisco_ray.stages.evaluate.stage import judge

    result = judge(model, model, settings, device=device, read_unseen=read_unseen)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        output_console().print(evaluation_view(EvaluationRecord.model_validate(result)))


@app.command()
def merge(
    models: Annotated[list[str], typer.Argument(
        metavar="MODEL...", help="Fine-tunes of one dense model: directories, or models of the Hugging Face hub (ORG/NAME).")],
    base: Annotated[str, typer.Option("--base", metavar="MODEL", help="The dense model that they were fine-tuned from.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory to write.")],
    calibration: Annotated[list[str] | None, typer.Option(
        "--calibration", metavar="TEXT", help="Text of one fine-tune's domain; once per fine-tune, in their order.")] = None,
    backbone: Annotated[BackboneOf, typer.Option(
        help="Everything but the MLPs: the mean of the fine-tunes, or the base model's.")] = "mean",
    experts_per_token: Annotated[int, typer.Option(min=1, help="Number of experts per token.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to read from all texts together.")] = 131_072,
    device: Annotated[str, typer.Option(help="Device that the models run on: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Merge dense fine-tunes of one model into an MoE: one expert per fine-tune, and routers computed from text."""
    from moedisco_ray.execution.merge_models import merge_models

    result = merge_models(
        models, base, output, texts=calibration or (), backbone=backbone, experts_per_token=experts_per_token,
        max_tokens=max_tokens, device=device)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        if "losses" in result:
            output_console().print(losses_view(result["losses"], result["texts"]))
        for warning in result["warnings"]:
            print(f"warning: {warning}")
        print(f"wrote {output}: {result['family']} with {len(models)} experts")


def _reporter(url: str, config: RunConfig, stop: StopFile) -> View:
    token = os.environ.get("MOEDISCO_RUN_TOKEN")
    if not token:
        raise ConfigError("--report-to", url, "needs the run's token in the environment variable MOEDISCO_RUN_TOKEN")
    from moedisco_ray.cli.reporter import Reporter

    return Reporter(url, token, config.directory / "events.jsonl", stop)


def output_console() -> Console:
    """A console on the standard output; in a pipe it is wide enough for tables."""
    # Keep the current sys.stdout: during a run, sys.stdout is redirected to the file of Ray's output.
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def _complain(line: str) -> None:
    print(f"moedisco: {line}", file=sys.stderr)
