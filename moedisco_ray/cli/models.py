"""The commands that take a finished model: export, push, chat, evaluate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from moedisco_ray.cli.arguments import AsJson, Device, ExpertsOn, FinishedModel, ResidentExperts
from moedisco_ray.cli.console import output_console
from moedisco_ray.cli.display import evaluation_view
from moedisco_ray.core.config import Evaluation, Source, check_evaluation
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.finished_models import finished_model
from moedisco_ray.core.records.summaries import EvaluationRecord
from moedisco_ray.core.registry import EXPORT_FORMATS, load
from moedisco_ray.core.store.locations import Location, parent

TaskFiles = Annotated[
    list[Path] | None, typer.Option("--lm-eval", metavar="FILE", help="A task file for lm-eval; repeatable.")
]
UnseenText = Annotated[
    list[str] | None,
    typer.Option("--sources", metavar="PATH", help="Text that the model was not trained on; repeatable."),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Directory or URI of a model that a run exported, OUTPUT/NAME/model; or any MoE of a supported family or "
        "dense relative of one: a directory, a GGUF file, or a model of the Hugging Face hub (ORG/NAME).",
    ),
]
_FORMATS = "; ".join(f"{name}: {each.title}" for name, each in EXPORT_FORMATS.items())


class Exporter(Protocol):
    """Writes the model of a run, or its sub-models, in one format."""

    def __call__(self, location: Location, target: Path, *, from_checkpoint: bool) -> dict[str, Any]:
        """Write a file or directory that does not exist yet.

        Args:
            location: Directory or URI of the run.
            target: File or directory to write.
            from_checkpoint: Whether to export the newest checkpoint of the fine-tune, instead of the finished model.

        Returns:
            At least `parameters`, `bytes`, and `step` of the checkpoint or None.
        """


def export(
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR", help="Directory or URI of a run; for GGUF also the directory of an exported model."
        ),
    ],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"Format: {_FORMATS}.")] = "hf",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="PATH",
            help="Directory or file to write.",
            show_default=f"NAME{', NAME'.join(each.suffix for each in EXPORT_FORMATS.values())}, here",
        ),
    ] = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Export the newest checkpoint of the fine-tune, finished or not.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Export the model of a run, finished or not, or its sub-models, in a format of other programs."""
    if (form := EXPORT_FORMATS.get(to)) is None:
        raise ConfigError("--to", to, f"is no format; use one of {', '.join(EXPORT_FORMATS)}")
    target = output or Path(parent(run_dir)[1] + form.suffix)
    write: Exporter = load(form, "--to", to)
    figures = write(run_dir, target, from_checkpoint=from_checkpoint)
    if as_json:
        print(json.dumps({"path": str(target), **figures}, indent=2))
    else:
        origin = "" if figures["step"] is None else f", from the checkpoint of step {figures['step']:,}"
        print(f"wrote {target}: {figures['parameters']:,} parameters, {figures['bytes']:,} bytes{origin}")


def push(
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR", help="Directory or URI of a finished run, or a directory that `moedisco export` wrote."
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face hub: ORG/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read the model.")] = False,
    message: Annotated[
        str, typer.Option("--message", metavar="TEXT", help="Message of the commit.")
    ] = "Upload the model",
    as_json: AsJson = False,
) -> None:
    """Upload the model of a finished run to the Hugging Face hub, privately; HF_TOKEN holds the access token."""
    model = finished_model(run_dir, ensemble=True)
    from moedisco_ray.core.store.hub_push import push_model

    pushed = push_model(model, repo, public=public, message=message)
    if as_json:
        print(json.dumps(dataclasses.asdict(pushed), indent=2))
    else:
        print(f"pushed {model} to {pushed.url}{' (private)' if pushed.private else ''}, commit {pushed.commit}")


def chat(
    run_dir: FinishedModel,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="Sampling temperature; 0 takes the likeliest token.", show_default="the model's own"),
    ] = None,
    device: Device = "auto",
    experts: Annotated[
        bool, typer.Option("--experts", help="Show after each answer which experts computed its tokens.")
    ] = False,
    experts_on: ExpertsOn = "device",
    resident_experts: ResidentExperts = None,
) -> None:
    """Chat with the model of a finished run; a model without a chat template continues text."""
    directory = finished_model(run_dir, ensemble=True)
    from moedisco_ray.cli.chat import chat as start_chat
    from moedisco_ray.cli.generation import open_model

    model, tokenizer = open_model(directory, device=device, experts_on=experts_on, resident_experts=resident_experts)
    start_chat(model, tokenizer, max_tokens=max_tokens, temperature=temperature, shows_experts=experts)


def evaluate(
    model: AnyModel,
    lm_eval: TaskFiles = None,
    sources: UnseenText = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of text tokens.")] = 1_000_000,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of examples per task file, from its start.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device that runs the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Evaluate a model, MoE or dense, on text that it was not trained on, and on lm-eval tasks."""
    if not lm_eval and not sources:
        raise ConfigError("--sources", None, "nothing to evaluate; name text, or task files with --lm-eval")
    settings = Evaluation(
        sources=tuple(Source(path=path) for path in sources or ()), lm_eval=tuple(lm_eval or ()), max_tokens=max_tokens
    )
    check_evaluation(settings)
    from moedisco_ray.cli.generation import checked_device
    from moedisco_ray.execution.given_models import open_model
    from moedisco_ray.stages.corpus.unseen import read_unseen
    from moedisco_ray.stages.evaluate.stage import judge

    opened, directory = open_model("MODEL", model, checked_device(device))
    result = judge(opened, directory, settings, read_unseen=read_unseen, most_examples=limit)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        output_console().print(evaluation_view(EvaluationRecord.model_validate(result)))
