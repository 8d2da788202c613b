"""Cluster documents: vectors, k-means, balanced assignment, report. `execution.ray.clustering` runs them on Ray."""

from moedisco_ray.stages.clustering.model import ClusterModel

__all__ = ["ClusterModel"]
