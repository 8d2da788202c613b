"""The service's commands, grouped by subject."""

import typer

from service.commands import (
    administering,
    backing_up,
    comparing,
    datasets,
    demo,
    limits,
    managing,
    node_agent,
    private,
    serving,
    submitting,
    watching,
)

commands = typer.Typer()
for group in (
    *(submitting, watching, managing, datasets, comparing, limits),
    *(administering, private, serving, backing_up, demo, node_agent),
):
    commands.add_typer(group.commands)
