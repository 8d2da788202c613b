"""Main memory that a member of sync points fills, next to weights, gradients and optimizer state.

Of the N weights that it exchanges, a member keeps between two syncs (`training.sync.coded`):

| | weights exchanged | 4 bits, resident | 4 bits, streamed |
|---|---|---|---|
| common weights of the last sync, in fp32 | 0 | 4 N | 4 N |
| what its codes have lost, in fp32 | 0 | 4 N | 4 N |
| a checkpoint's copy of that | 0 | 4 N | 0 |

A streamed training writes checkpoints without a copy. The momentum of the outer step is in the files of the syncs, and
passes through memory in pieces. So do weights and codes: next to the pieces that are read ahead there are, while a
member combines, six pieces in fp64, or, while it loads, the largest tensor in fp32. These buffers do not depend on the
number of members. They are filled between two steps, when the host has no gradients of a resident training.
"""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.config import Residence, RunConfig, Submodels
from moedisco_ray.core.limits import SYNC_AHEAD, SYNC_ELEMENTS
from moedisco_ray.plan.parameters import Parameters

_FP32, _FP64 = 4, 8
_COMBINED = 6
"""Pieces in fp64 while a piece is combined: momentum before and after, delta, weighted delta, sum and update."""


@dataclasses.dataclass(frozen=True)
class SyncMemory:
    """Bytes of main memory that a member fills for its syncs.

    Attributes:
        reference: Common weights of the last sync.
        residuals: What its codes have lost.
        copies: A checkpoint's copy of the residuals.
        buffers: Pieces that are read, combined and written.
    """

    reference: int = 0
    residuals: int = 0
    copies: int = 0
    buffers: int = 0

    @property
    def held(self) -> int:
        """Bytes that stay between two syncs."""
        return self.reference + self.residuals + self.copies

    @property
    def total(self) -> int:
        """Bytes during a sync."""
        return self.held + self.buffers


def sync_memory(settings: Submodels, parameters: Parameters, exchanged: int, residence: Residence) -> SyncMemory:
    """Main memory that a member fills for its syncs.

    Args:
        settings: Settings of the sub-models, which hold for the seed too.
        parameters: Parameter counts of the member's model.
        exchanged: Number of weights that the member exchanges; 0 without syncs.
        residence: Where its weights are.
    """
    if not exchanged:
        return SyncMemory()
    ahead = (SYNC_AHEAD + 1) * _FP32 * SYNC_ELEMENTS
    buffers = ahead + max(_COMBINED * _FP64 * SYNC_ELEMENTS, _FP32 * parameters.largest_tensor)
    if settings.sync_bits is None:
        return SyncMemory(buffers=buffers)
    weights = _FP32 * exchanged
    return SyncMemory(weights, weights, weights if residence == "resident" else 0, buffers)


def exchanged_weights(config: RunConfig, parameters: Parameters) -> int:
    """Number of weights that a member of the run exchanges: all with other members of a seed, or a backbone.

    Args:
        config: The run's configuration, with a number of clusters.
        parameters: Parameter counts of the seed, and of a sub-model.
    """
    if config.submodels.sync_every is None:
        return 0
    if config.tokens.seed and config.seed_members > 1:
        return parameters.total
    apart = config.tokens.decoupled and config.cluster_count > 1
    return parameters.total - parameters.experts - parameters.router if apart else 0
