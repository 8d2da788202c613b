"""The actors of a run, which are found by their names in a Ray namespace of the run."""

from __future__ import annotations

import ray
from ray.util import list_named_actors


def mailbox_name(run: str) -> str:
    """Name of the mailbox actor of a run."""
    return f"{run}-mailbox"


def number_of(name: str) -> int:
    """The number at the end of a seat's name; 0 if there is none."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def named_actors(namespace: str) -> list[str]:
    """Names of the actors of a namespace that live, or wait for their resources."""
    return [entry["name"] for entry in list_named_actors(all_namespaces=True) if entry["namespace"] == namespace]


def kill_named(name: str, namespace: str) -> None:
    """End an actor at once, if it lives."""
    try:
        actor = ray.get_actor(name, namespace)
    except ValueError:  # it ended meanwhile
        return
    ray.kill(actor)
