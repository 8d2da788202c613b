"""The files of cluster_yaml, and what is said of all of them."""

from __future__ import annotations

from pathlib import Path

import yaml

from moedisco_ray.execution import clouds

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster_yaml"
CLOUDS = tuple(f"{cloud}/spot" for cloud in clouds.CLOUDS)
LAUNCHER = (*CLOUDS, "on-prem", "local-fake")
"""For `ray up` or `ray start`; the others are for kubectl."""
KUBERNETES = ("kuberay", "kuberay-job")


def load(name):
    """A file for Ray's launcher as a dictionary."""
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def kubernetes_objects():
    """The objects of the files, those of a `List` one by one."""
    documents = [each for name in KUBERNETES for each in yaml.safe_load_all((FOLDER / f"{name}.yaml").read_text())]
    return [item for each in documents for item in (each["items"] if each["kind"] == "List" else [each])]


def workers(config):
    """Node types that are not the head's, in the order of the file."""
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def pool(kind):
    return kind["labels"]["moedisco/pool"]


def market(kind):
    return kind["labels"]["moedisco/market"]
