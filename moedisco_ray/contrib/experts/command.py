"""The command `experts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moedisco_ray.cli.arguments import AsJson, FinishedModel
from moedisco_ray.cli.console import output_console
from moedisco_ray.contrib.merge.losses_view import losses_view

commands = typer.Typer()


@commands.command()
def experts(
    run_dir: FinishedModel,
    chosen: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERTS...",
            help="Experts of every layer in their new order: 0,2-5, or RUN_DIR:0,2-5 of another model; the "
            "MLP of a dense model is DIR:0.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="Directory to write.")],
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=1,
            help="Experts per token.",
            show_default="the model's own, or all experts if there are fewer",
        ),
    ] = None,
    own_text: Annotated[
        list[str] | None,
        typer.Option(
            "--own-text",
            metavar="TEXT",
            help="Text that the model knows, such as that of one of its domains, on which "
            "both models are measured; repeatable.",
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="Text of an expert of another model, from which its router rows are computed; once per such expert, "
            "in their order. Without such experts: text that the model knows, from which the experts are refitted if "
            "some are left out or --top-k is lowered.",
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of tokens to read from all texts together, in documents spread over the first 256 "
            "million characters of each.",
        ),
    ] = 131_072,
    device: Annotated[str, typer.Option(help="Device that the models run on: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Write a model with some of its experts, experts of other models, or both: to remove, replace or add experts."""
    from moedisco_ray.cli.generation import checked_device
    from moedisco_ray.contrib.experts.choose_experts import choose_experts
    from moedisco_ray.core.store.locations import parent

    result = choose_experts(
        run_dir,
        chosen,
        output,
        top_k=top_k,
        own_texts=own_text or (),
        texts=calibration or (),
        max_tokens=max_tokens,
        device=checked_device(device),
    )
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        if "losses" in result:
            output_console().print(losses_view(result["losses"], result["texts"], perplexity=True))
            shares = zip(result["texts"], result["shares"], strict=True)
            read = (f"{share:.1%} of {parent(text)[1]}" for text, share in shares)
            print("read, spread over the text:", ", ".join(read))
        for warning in result.get("warnings", ()):
            print(f"warning: {warning}")
        number = len(result["experts"])
        measure = "" if "losses" in result else f"; measure it with moedisco evaluate {output} --sources TEXT"
        print(
            f"wrote {output}: {result['family']} with {number} expert{'s'[: number > 1]}, "
            f"top-{result['top_k']}{measure}"
        )
