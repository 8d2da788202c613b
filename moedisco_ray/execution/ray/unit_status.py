"""What the driver knows of a training that workers carry out."""

from __future__ import annotations

import dataclasses

from moedisco_ray.core.records.events import Event


@dataclasses.dataclass(frozen=True)
class UnitStatus:
    """The last known state of a unit (one training).

    Attributes:
        nodes: Ids of the nodes of the unit's workers; empty while the unit has no workers.
        step: Last step that the newest attempt reported; 0 if it has reported none.
        step_seconds: Seconds per step, as last reported by any attempt.
        stall: Seconds for which the newest checkpoint halted training.
        held_at: Time at which the newest attempt got its workers, in seconds since the epoch; None while it has no
            workers.
        start_seconds: Seconds from getting workers to the first progress event, in the newest attempt with such an
            event.
        exit_step: Step (from 0) in which the first worker of the newest attempt ended; None if no worker reported it.
        reports: Number of progress events of the newest attempt.
        pulse_at: Time of the newest attempt's last sign of life, in seconds since the epoch; None if it gave none.
        hung_seconds: Seconds for which the newest attempt has hung, as it says itself.
        card_gb: Memory that the newest attempt's cards have for it (GiB); None before it begins, and without cards.
    """

    nodes: tuple[str, ...] = ()
    step: int = 0
    step_seconds: float | None = None
    stall: float = 0.0
    held_at: float | None = dataclasses.field(default=None, compare=False)
    start_seconds: float | None = dataclasses.field(default=None, compare=False)
    exit_step: int | None = None
    reports: int = dataclasses.field(default=0, compare=False)
    pulse_at: float | None = dataclasses.field(default=None, compare=False)
    hung_seconds: float = dataclasses.field(default=0.0, compare=False)
    card_gb: float | None = dataclasses.field(default=None, compare=False)

    @property
    def current_step(self) -> int | None:
        """The current step (from 0), from a worker's exit or else its last progress event; None if unknown."""
        return self.exit_step if self.exit_step is not None else self.step or None

    def updated(self, event: Event) -> UnitStatus:
        data = event.data
        if event.type == "checkpoint":
            return dataclasses.replace(self, stall=data["stall"])
        if event.type == "unit_started":
            return dataclasses.replace(self, card_gb=data.get("card_gb"))
        if event.type != "progress":
            return self
        speed = data["tokens_per_second"] * data["step"] / data["tokens"] if data["tokens"] else 0.0
        first = self.held_at is not None and not self.step
        return dataclasses.replace(
            self,
            step=data["step"],
            reports=self.reports + 1,
            step_seconds=1 / speed if speed else self.step_seconds,
            start_seconds=event.time - (self.held_at or 0.0) if first else self.start_seconds,
        )
