"""The summary of the decompose stage: how a trained MoE was cut into sub-models, and what that lost."""

from __future__ import annotations

from pydantic import Field

from moedisco_ray.core.records.summaries import Record


class StartLoss(Record):
    """What a sub-model of a trained MoE loses before its training, on a sample of its cluster's training text."""

    cluster: int
    start: float
    """Loss of the MoE that the sub-model is cut from (nats per token)."""
    submodel: float
    """Loss of the sub-model (nats per token)."""

    @property
    def lost(self) -> float:
        """Loss of the sub-model above that of the MoE (nats per token)."""
        return self.submodel - self.start


class DecomposeSummary(Record):
    """Summary of the decompose stage; empty in a run without sub-models."""

    bytes: list[int] = Field(default_factory=list)
    """Size of each sub-model's weights (bytes), the backbone included."""
    own_share: float | None = None
    """Share of the selections of each cluster's text that goes to the experts of its own sub-model, mean over clusters
    and layers; null if sub-models have their experts by index."""
    own_share_by_index: float | None = None
    """The same, if sub-models had their experts by index."""
    losses: list[StartLoss] = Field(default_factory=list)
    """Losses of the untrained sub-models of a trained MoE; without those of data owners."""

    @property
    def note(self) -> str | None:
        """In words what the sub-models of a trained MoE begin with; None if it was not measured."""
        if not self.losses:
            return None
        most = max(self.losses, key=lambda each: each.lost)
        words = (
            f"before their training, sub-models lose up to {most.lost:.3f} nats per token more than the MoE on their "
            f"own text (sub-model {most.cluster}: {most.submodel:.3f}, the MoE {most.start:.3f})"
        )
        if self.own_share is None or self.own_share_by_index is None:
            return words
        return (
            f"{words}; their experts take {self.own_share:.0%} of what their text selects in the MoE, "
            f"{self.own_share_by_index:.0%} by index"
        )
