"""The command line of the study, from a clone.

`python -m benchmarks.study compare CONFIG`, `... grid`, `... advise CONFIG` and `... quick`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.study.compare.arms import ARMS
from benchmarks.study.compare.figures import plot_comparison
from benchmarks.study.compare.run import BUDGETS, compare
from benchmarks.study.compare.table import compare_view
from benchmarks.study.grid.command import advise_on, measure_grid
from benchmarks.study.grid.quick import quick
from moedisco_ray.cli.app import Commands
from moedisco_ray.cli.arguments import AsJson, ConfigPath, Overrides
from moedisco_ray.cli.console import output_console
from moedisco_ray.cli.display import listener_for
from moedisco_ray.core.config import load_config
from moedisco_ray.core.store.locations import is_uri, joined
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.plan import with_cluster_count

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Compare ways to train one MoE.",
)


@app.command("compare")
def compare_arms(
    config: ConfigPath,
    overrides: Overrides = None,
    arms: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help=f"Arms to train, of {', '.join(ARMS)}; omitted: all. Joint training is always included.",
        ),
    ] = "",
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Directory or URI for the results; omitted: OUTPUT/NAME-compared.")
    ] = None,
    to_loss: Annotated[
        bool, typer.Option("--to-loss", help="Also train each arm until it reaches joint training's loss.")
    ] = False,
    slice_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=("Tokens of each short training that tunes an arm's learning rate and batch size; 0: no tuning."),
            show_default="a quarter of tokens.total",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare with baselines (joint training, upcycling, BTX, ...) at equal tokens and equal cost, each tuned alike."""
    checked = with_cluster_count(load_config(config, [*(overrides or ()), "recipe=null"]))
    names = [name for name in arms.split(",") if name]
    named = joined(checked.output, f"{checked.name}-compared") if output is None else output
    place = named if is_uri(named) else Path(named)
    console = output_console()
    view = functools.partial(listener_for, console, as_json)
    budgets = (*BUDGETS, "loss") if to_loss else BUDGETS
    slices = checked.tokens.total // 4 if slice_tokens is None else slice_tokens
    result = compare(checked, place, names, budgets=budgets, view=view, slice_tokens=slices)
    store = RunStore.of(place)
    figures = plot_comparison(result, store.directory / "figures")
    store.publish(*figures)
    if as_json:
        console.file.write(f"{result.model_dump_json(indent=2)}\n")
        return
    console.print()
    console.print(compare_view(result))
    for path in (store.directory / "compare.json", *figures):
        console.print(str(joined(place, *path.relative_to(store.directory).parts)), soft_wrap=True)


app.command("grid")(measure_grid)
app.command("advise")(advise_on)
app.command()(quick)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.study")
