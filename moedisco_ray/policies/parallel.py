"""How the workers of a gang share a model: replicas, shards of a replica, and experts within a group of workers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the three axes of a gang's workers; the last axis varies fastest, so its workers are neighbours.

    Attributes:
        replicate: Number of replicas of the model.
        data: Number of workers among which each expert is sharded.
        expert: Number of workers among which the experts of a layer are divided. A worker has whole experts of every
            layer, and tokens travel to them; all other weights are sharded among the `data` x `expert` workers of a
            replica.
    """

    replicate: int = 1
    data: int = 1
    expert: int = 1

    @property
    def shards(self) -> int:
        """Workers of a replica."""
        return self.data * self.expert


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What decides the layout of a gang of any size.

    Attributes:
        experts: Experts per layer.
        expert: Number of workers among which experts are divided; None: all workers of a node.
        replicate: Number of replicas; None: one per node, or one in all.
        fewest_shards: Number of workers whose memory is enough for one replica.
        whole_experts: Whether no expert may be sharded.
    """

    experts: int
    expert: int | None = None
    replicate: int | None = None
    fewest_shards: int = 1
    whole_experts: bool = False

    def layout(self, workers: int, per_node: int) -> Layout:
        """The layout of a gang.

        By default, experts are divided among the workers of a node, since tokens travel in every layer and links inside
        a node are fast. Each node has a replica of the model if one node's memory is enough for it, since then only
        gradients cross nodes. A size that does not divide the workers is lowered to one that does.

        Args:
            workers: Number of workers.
            per_node: Number of workers on each node; 1 if nodes have different numbers.
        """
        expert = _largest(workers, min(self.experts, self.expert or per_node), self.experts)
        replicate = self.replicate
        if replicate is None:
            fits = per_node > 1 and self.fewest_shards <= per_node and workers % per_node == 0
            replicate = workers // per_node if fits else 1
        replicate = _largest(workers // expert, replicate)
        if self.whole_experts and self.experts % (workers // replicate):
            expert = 1
        return Layout(replicate, workers // (expert * replicate), expert)


def _largest(whole: int, most: int, also: int | None = None) -> int:
    """The largest divisor of `whole`, and of `also`, up to `most`."""
    return next(n for n in range(max(1, most), 0, -1) if whole % n == 0 and (also is None or also % n == 0))
