"""The command `merge`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from moedisco_ray.cli.arguments import AsJson
from moedisco_ray.cli.console import output_console
from moedisco_ray.contrib.merge.losses_view import losses_view

commands = typer.Typer()
BackboneOf = Literal["mean", "base"]


@commands.command()
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Fine-tunes of one dense model: directories, or models of the Hugging Face hub (ORG/NAME).",
        ),
    ],
    base: Annotated[
        str, typer.Option("--base", metavar="MODEL", help="The dense model that they were fine-tuned from.")
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory to write.")],
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration", metavar="TEXT", help="Text of one fine-tune's domain; once per fine-tune, in their order."
        ),
    ] = None,
    backbone: Annotated[
        BackboneOf, typer.Option(help="Everything but the MLPs: the mean of the fine-tunes, or the base model's.")
    ] = "mean",
    experts_per_token: Annotated[int, typer.Option(min=1, help="Number of experts per token.")] = 2,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens to read from all texts together.")
    ] = 131_072,
    device: Annotated[str, typer.Option(help="Device that the models run on: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Merge dense fine-tunes of one model into an MoE: one expert per fine-tune, and routers computed from text."""
    from moedisco_ray.cli.generation import checked_device
    from moedisco_ray.contrib.merge.merge_models import merge_models

    result = merge_models(
        models,
        base,
        output,
        texts=calibration or (),
        backbone=backbone,
        experts_per_token=experts_per_token,
        max_tokens=max_tokens,
        device=checked_device(device),
    )
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        if "losses" in result:
            output_console().print(losses_view(result["losses"], result["texts"]))
        for warning in result["warnings"]:
            print(f"warning: {warning}")
        print(f"wrote {output}: {result['family']} with {len(models)} experts")
