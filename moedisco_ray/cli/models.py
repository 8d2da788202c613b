"""The commands that take a finished model: export, push, chat, evaluate, merge, experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moedisco_ray.cli.arguments import AsJson, Device, ExpertsOn, FinishedModel, ResidentExperts
from moedisco_ray.cli.console import output_console
from moedisco_ray.cli.display import evaluation_view, losses_view
from moedisco_ray.core.config import Evaluation, Source, check_evaluation
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.finished_models import finished_model, model_to_push
from moedisco_ray.core.gguf_files import check_packages
from moedisco_ray.core.locations import parent
from moedisco_ray.core.records import EvaluationRecord

TaskFiles = Annotated[
    list[Path] | None, typer.Option("--lm-eval", metavar="FILE", help="A task file for lm-eval; repeatable."),
]
UnseenText = Annotated[
    list[str] | None, typer.Option("--sources", metavar="PATH", help="Text that the model was not trained on; repeatable."),
]
BackboneOf = Literal["mean", "base"]
AnyModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Directory or URI of a model that a run exported, OUTPUT/NAME/model; or any MoE of a "
    "supported family or dense relative of one: a directory, a GGUF file, or a model of the Hugging Face hub (ORG/NAME).")]


def export(
    run_dir: Annotated[str, typer.Argument(
        metavar="RUN_DIR", help="Directory or URI of a run; for GGUF also the directory of an exported model.")],
    to: Annotated[Literal["hf", "gguf", "ensemble"], typer.Option(
        "--to", help="Format: a Hugging Face directory; a GGUF file for llama.cpp, Ollama and LM Studio; or a directory with the "
        "sub-models as an ensemble, never merged.")] = "hf",
    output: Annotated[Path | None, typer.Option(
        "--output", metavar="PATH", help="Directory or file to write.",
        show_default="NAME-model, NAME.gguf or NAME-ensemble, here")] = None,
    from_checkpoint: Annotated[
        bool, typer.Option("--from-checkpoint", help="Export the newest checkpoint of the fine-tune, finished or not.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export the model of a run, finished or not, as a Hugging Face directory or a GGUF file, or its sub-models as an ensemble."""
    name = parent(run_dir)[1]
    if to == "ensemble" and from_checkpoint:
        raise ConfigError("--from-checkpoint", None, "an ensemble has the trained sub-models, not the fine-tune; leave it out")
    if to == "gguf":
        check_packages("--to", to)
        from moedisco_ray.execution.export_gguf import export_gguf

        target = output or Path(f"{name}.gguf")
        figures = export_gguf(run_dir, target, from_checkpoint=from_checkpoint)
    elif to == "ensemble":
        from moedisco_ray.execution.export_ensemble import export_ensemble

        target = output or Path(f"{name}-ensemble")
        figures = export_ensemble(run_dir, target)
    else:
        from moedisco_ray.execution.export_run import export_run

        target = output or Path(f"{name}-model")
        figures = export_run(run_dir, target, from_checkpoint=from_checkpoint)
    if as_json:
        print(json.dumps({"path": str(target), **figures}, indent=2))
    else:
        origin = "" if figures["step"] is None else f", from the checkpoint of step {figures['step']:,}"
        print(f"wrote {target}: {figures['parameters']:,} parameters, {figures['bytes']:,} bytes{origin}")


def push(
    run_dir: Annotated[str, typer.Argument(
        metavar="RUN_DIR", help="Directory or URI of a finished run, or a directory that `moedisco export` wrote.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the Hugging Face hub: ORG/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read the model.")] = False,
    message: Annotated[str, typer.Option("--message", metavar="TEXT", help="Message of the commit.")] = "Upload the model",
    as_json: AsJson = False,
) -> None:
    """Upload the model of a finished run to the Hugging Face hub, privately; HF_TOKEN holds the access token."""
    model = model_to_push(run_dir)
    from moedisco_ray.core.hub_push import push_model

    pushed = push_model(model, repo, public=public, message=message)
    if as_json:
        print(json.dumps(dataclasses.asdict(pushed), indent=2))
    else:
        print(f"pushed {model} to {pushed.url}{' (private)' if pushed.private else ''}, commit {pushed.commit}")


def chat(
    run_dir: FinishedModel,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens per answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(
        min=0, help="Sampling temperature; 0 takes the likeliest token.", show_default="the model's own")] = None,
    device: Device = "auto",
    experts: Annotated[bool, typer.Option("--experts", help="Show after each answer which experts computed its tokens.")] = False,
    experts_on: ExpertsOn = "device",
    resident_experts: ResidentExperts = None,
) -> None:
    """Chat with the model of a finished run; a model without a chat template continues text."""
    directory = finished_model(run_dir)
    from moedisco_ray.cli.chat import chat as start_chat
    from moedisco_ray.cli.generation import open_model

    model, tokenizer = open_model(directory, device=device, experts_on=experts_on, resident_experts=resident_experts)
    start_chat(model, tokenizer, max_tokens=max_tokens, temperature=temperature, shows_experts=experts)


def evaluate(
    model: AnyModel,
    lm_eval: TaskFiles = None,
    sources: UnseenText = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of text tokens.")] = 1_000_000,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of examples per task file, from its start.")] = None,
    device: Annotated[str, typer.Option(help="Device that runs the model: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Evaluate a model, MoE or dense, on text that it was not trained on, and on lm-eval tasks."""
    if not lm_eval and not sources:
        raise ConfigError("--sources", None, "nothing to evaluate; name text, or task files with --lm-eval")
    settings = Evaluation(
        sources=tuple(Source(path=path) for path in sources or ()), lm_eval=tuple(lm_eval or ()), lm_eval_limit=limit,
        max_tokens=max_tokens)
    check_evaluation(settings)
    from moedisco_ray.cli.generation import checked_device
    from moedisco_ray.execution.given_models import open_model
    from moedisco_ray.stages.corpus.unseen import read_unseen
    from moedisco_ray.stages.evaluate.stage import judge

    opened, directory = open_model("MODEL", model, checked_device(device))
    result = judge(opened, directory, settings, read_unseen=read_unseen)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        output_console().print(evaluation_view(EvaluationRecord.model_validate(result)))


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
    from moedisco_ray.cli.generation import checked_device
    from moedisco_ray.execution.merge_models import merge_models

    result = merge_models(
        models, base, output, texts=calibration or (), backbone=backbone, experts_per_token=experts_per_token,
        max_tokens=max_tokens, device=checked_device(device))
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        if "losses" in result:
            output_console().print(losses_view(result["losses"], result["texts"]))
        for warning in result["warnings"]:
            print(f"warning: {warning}")
        print(f"wrote {output}: {result['family']} with {len(models)} experts")


def experts(
    run_dir: FinishedModel,
    chosen: Annotated[list[str], typer.Argument(
        metavar="EXPERTS...", help="Experts of every layer in their new order: 0,2-5, or RUN_DIR:0,2-5 of another model; the "
        "MLP of a dense model is DIR:0.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory to write.")],
    top_k: Annotated[int | None, typer.Option(
        "--top-k", min=1, help="Experts per token.", show_default="the model's own, or all experts if there are fewer")] = None,
    own_text: Annotated[list[str] | None, typer.Option(
        "--own-text", metavar="TEXT", help="Text that the model knows, such as that of one of its domains, on which "
        "both models are measured; repeatable.")] = None,
    calibration: Annotated[list[str] | None, typer.Option(
        "--calibration", metavar="TEXT", help="Text of an expert of another model, from which its router rows are computed; once "
        "per such expert, in their order. Without such experts: text that the model knows, from which the experts are refitted if "
        "some are left out or --top-k is lowered.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to read from all texts together.")] = 131_072,
    device: Annotated[str, typer.Option(help="Device that the models run on: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write a model with some of its experts, with experts of other models, or both: to remove, replace or add experts."""
    from moedisco_ray.cli.generation import checked_device
    from moedisco_ray.execution.choose_experts import choose_experts

    result = choose_experts(
        run_dir, chosen, output, top_k=top_k, own_texts=own_text or (), texts=calibration or (), max_tokens=max_tokens,
        device=checked_device(device))
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        if "losses" in result:
            output_console().print(losses_view(result["losses"], result["texts"], perplexity=True))
        for warning in result.get("warnings", ()):
            print(f"warning: {warning}")
        number = len(result["experts"])
        measure = "" if "losses" in result else f"; measure it with moedisco evaluate {output} --sources TEXT"
        print(f"wrote {output}: {result['family']} with {number} expert{'s'[:number > 1]}, top-{result['top_k']}{measure}")
