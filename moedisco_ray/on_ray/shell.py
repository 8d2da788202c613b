from __future__ import annotations

from moedisco_ray.on_ray.cluster import build_clusters
from moedisco_ray.on_ray.corpus import build_corpus
from moedisco_ray.on_ray.tasks import run_on
from moedisco_ray.on_ray.trainers import train_all


class RayShell:
    """Runs the pipeline's work on the connected Ray cluster."""

    build_corpus = staticmethod(build_corpus)
    build_clusters = staticmethod(build_clusters)
    call = staticmethod(run_on)
    train_all = staticmethod(train_all)
