"""What `moedisco doctor` found and measured on a cluster or on this machine, as a versioned JSON document.

The newest document of each place is kept in the user's cache folder (`MOEDISCO_CACHE_DIR`), so that a plan can read it
without Ray, torch or the cluster. A run stores a copy with its files.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from moedisco_ray.core.cards import find_card
from moedisco_ray.core.config import Pool, TrainingStageName
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.run_record import MachineNote
from moedisco_ray.core.records.summaries import Record
from moedisco_ray.core.store.artifacts import write_text
from moedisco_ray.core.store.locations import cache_directory

SCHEMA_VERSION = 1
MEASUREMENTS = "measurements.json"
"""Name of the document in a run directory."""
THIS_MACHINE = "this machine"
"""Place of measurements without a Ray cluster."""
MOST_AGE = 7 * 24 * 3600.0
"""Age from which a plan no longer uses measurements (s): machines, drivers and neighbours change."""

Part = Literal["system", "kernels", "memory", "speed", "network", "resume"]
"""Parts of an examination, in the order in which they run and are shown."""
State = Literal["ok", "warning", "failed", "skipped"]


class Check(Record):
    """The outcome of one check."""

    part: Part
    name: str
    """What was checked, such as `bf16` or `free memory`."""
    state: State
    found: str
    """What was found, in one line."""
    remedy: str | None = None
    """What to do; null if there is nothing to do."""

    @property
    def is_bad(self) -> bool:
        """Whether the check failed or warns."""
        return self.state in ("warning", "failed")


class MemoryTrial(Record):
    """Memory of two training steps, compared with the plan's."""

    stage: TrainingStageName
    planned_bytes: int
    """Peak that the plan states, without its overhead."""
    peak_bytes: int
    """Peak that was measured."""
    micro_batch: int
    """Sequences in one forward pass, as planned."""
    largest_micro_batch: int | None = None
    """Largest power of two of sequences that fitted; null if it was not tried."""


class SpeedTrial(Record):
    """Speed of training two layers of a model, with the planned settings."""

    stage: TrainingStageName
    experts: int
    """Experts per layer of the model."""
    tokens_per_second: float
    flops_per_second: float
    """Operations of the model per second, without recomputation."""
    mfu: float | None = None
    """Share of the card's peak; null on a CPU and on a card that is not known."""


class Copies(Record):
    """Speed of copies between a card and the machine's memory (bytes/s)."""

    to_card: float
    from_card: float
    both: float
    """Each way, while data move both ways."""
    at_once: float | None = None
    """To the card, while all cards of the node copy; null for a card alone."""


class SlotRecord(Record):
    """One slot: a card, or a part of a machine without one."""

    name: str
    """Node and device, such as `node-3 (10.0.0.3), GPU 1`."""
    node: str
    device: str
    """torch's name of the device, such as `cuda:0`."""
    pool: str | None = None
    """Key of the pool, or of the node type of a mixed pool, whose slot it is; null: it was measured without a
    configuration."""
    resource: str | None = None
    """Ray resource of the pool's nodes; null: the slot was measured without a Ray cluster."""
    kind: str
    """Name of the card, the versions of its driver and of torch: cards of one kind behave alike."""
    card: str | None = None
    """Name of the card in CUDA; null for a CPU."""
    memory_bytes: int | None = None
    free_bytes: int | None = None
    """Memory that was free before the trials; null if it is not known."""
    checks: list[Check] = Field(default_factory=list)
    memory: MemoryTrial | None = None
    speed: SpeedTrial | None = None
    copies: Copies | None = None
    host_memory: float | None = None
    """Speed of copies within the machine's memory, reads plus writes (bytes/s)."""


class NetworkRecord(Record):
    """Exchanges among some slots of a pool."""

    pool: str
    resource: str | None = None
    backend: str
    """Library of the exchange: `nccl` or `gloo`."""
    scope: Literal["within", "between"]
    """Whether the workers share a node, or each is on a node of its own."""
    workers: int
    interface: str | None = None
    """Network interface that gloo and NCCL use; null if none was named."""
    all_reduce: float
    """Bytes per second that each worker sends, and as many that it receives, in an all-reduce."""
    all_to_all: float | None = None
    """The same in an all-to-all; null if the backend has none."""


class StorageRecord(Record):
    """Speed of the storage of checkpoints, from one node."""

    node: str
    location: str
    write: float
    """Bytes per second."""
    read: float


class Measurements(Record):
    """What an examination found and measured."""

    schema_version: int = SCHEMA_VERSION
    place: str
    """Address of the Ray cluster, or `this machine`."""
    measured_at: float
    """Time of the examination (s since the epoch)."""
    seconds: float = 0.0
    """Duration of the examination (s)."""
    slots: list[SlotRecord] = Field(default_factory=list)
    networks: list[NetworkRecord] = Field(default_factory=list)
    storages: list[StorageRecord] = Field(default_factory=list)
    checks: list[Check] = Field(default_factory=list)
    """Checks that belong to no slot, such as those of the network."""
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def failures(self) -> list[Check]:
        """All checks that failed."""
        every = (*self.checks, *(check for slot in self.slots for check in slot.checks))
        return [check for check in every if check.state == "failed"]

    def slots_of(self, pool: Pool) -> list[SlotRecord]:
        """The slots of a pool's nodes, or of a node type's.

        On one machine without Ray, every card serves every pool that names no other card.
        """
        named = pool.gpu_card

        def serves(slot: SlotRecord) -> bool:
            if slot.resource is not None:
                return slot.resource == pool.resource
            return named is None or (slot.card is not None and find_card(slot.card) == named)

        return [slot for slot in self.slots if (slot.card is not None) == bool(pool.gpu) and serves(slot)]

    def free_gib(self, pool: Pool) -> float | None:
        """Smallest free memory of a pool's cards (GiB); None if it was not measured."""
        free = [slot.free_bytes for slot in self.slots_of(pool) if slot.card is not None and slot.free_bytes]
        return min(free) / 2**30 if free else None

    def flops(self, pool: Pool, experts: int) -> float | None:
        """Median speed of a pool's workers that train a model (operations/s); None if it was not measured.

        Args:
            pool: The pool, or a node type of it.
            experts: Experts per layer of the model: one, or several.
        """
        found = [
            slot.speed.flops_per_second
            for slot in self.slots_of(pool)
            if slot.speed is not None and (slot.speed.experts == 1) == (experts == 1)
        ]
        return statistics.median(found) if found else None

    def exchange(self, pool: Pool, scope: Literal["within", "between"]) -> float | None:
        """Slowest all-reduce of a pool's workers (bytes/s each way); None if it was not measured."""
        found = [
            each.all_reduce
            for each in self.networks
            if each.scope == scope
            and each.resource in (None, pool.resource)
            and (each.backend == "nccl") == bool(pool.gpu)
        ]
        return min(found) if found else None

    def age(self, now: float) -> str:
        """Age in words, such as `3 min ago`."""
        seconds = max(0.0, now - self.measured_at)
        units = ((86_400, "days", 2), (3600, "h", 1), (60, "min", 1))
        size, unit = next(((size, unit) for size, unit, least in units if seconds >= least * size), (1, "s"))
        return f"{seconds // size:.0f} {unit} ago"


def place_of(environment: Mapping[str, str] = os.environ) -> str:
    """The place that commands of this process measure: a Ray cluster by its address, or this machine."""
    return environment.get("RAY_ADDRESS") or THIS_MACHINE


def measurements_path(place: str) -> Path:
    """File of the newest measurements of a place on this machine."""
    return cache_directory() / "measurements" / f"{hashlib.sha256(place.encode()).hexdigest()[:16]}.json"


def store_measurements(found: Measurements) -> Path:
    """Replace the measurements of a place by newer ones; return their file.

    Raises:
        OSError: The file cannot be written.
    """
    path = measurements_path(found.place)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, found.model_dump_json(indent=2) + "\n")
    return path


def stored_measurements(place: str, now: float | None = None) -> Measurements | None:
    """The newest measurements of a place; None if there are none, or only old ones.

    Args:
        place: The place (`place_of`).
        now: Time of the question (s since the epoch); None: the current time.

    Raises:
        ConfigError: The file is none that this release can read.
    """
    path = measurements_path(place)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    found = read_measurements(content, str(path))
    return found if (time.time() if now is None else now) - found.measured_at <= MOST_AGE else None


def read_measurements(content: bytes, name: str) -> Measurements:
    """Read a document.

    Args:
        content: Content of the file.
        name: Name of the file, for errors.

    Raises:
        ConfigError: The content is none that this release can read.
    """
    try:
        return Measurements.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(
            "measurements", name, "is damaged, or of another release; run `moedisco doctor` again, or delete it"
        ) from error


def machine_notes(found: Measurements) -> list[MachineNote]:
    """What was measured, by kind of card, for a report; without the slots that have no card."""
    by_kind: dict[str, list[SlotRecord]] = {}
    for slot in found.slots:
        if slot.card is not None:
            by_kind.setdefault(slot.kind, []).append(slot)
    return [_machine_note(kind, slots, found.measured_at) for kind, slots in by_kind.items()]


def _machine_note(kind: str, slots: list[SlotRecord], measured_at: float) -> MachineNote:
    count = len({slot.name for slot in slots})
    free = min((slot.free_bytes for slot in slots if slot.free_bytes is not None), default=None)
    tflops = {stage: median / 1e12 for stage, median in _medians(slots, "flops_per_second").items()}
    mfu = _medians(slots, "mfu")
    problems = sorted({f"{check.name}: {check.found}" for slot in slots for check in slot.checks if check.is_bad})
    parts = [f"{count} x {kind}"]
    parts += [] if free is None else [f"{free / 2**30:.1f} GiB free"]
    parts += [
        f"{rate:.3g} TFLOP/s in two layers of {stage}" + (f" ({mfu[stage]:.0%} MFU)" if stage in mfu else "")
        for stage, rate in tflops.items()
    ]
    day = time.strftime("%Y-%m-%d", time.gmtime(measured_at))
    return MachineNote(
        kind=kind,
        slots=count,
        measured_at=measured_at,
        free_bytes=free,
        tflops=tflops,
        mfu=mfu,
        problems=problems,
        words=f"measured on {day}: {', '.join(parts)}{''.join(f'; {problem}' for problem in problems)}",
    )


def _medians(slots: list[SlotRecord], field: str) -> dict[str, float]:
    """Median of a figure of the speed trials, by stage."""
    figures: dict[str, list[float]] = {}
    for slot in slots:
        if slot.speed is not None and getattr(slot.speed, field) is not None:
            figures.setdefault(slot.speed.stage, []).append(getattr(slot.speed, field))
    return {stage: statistics.median(values) for stage, values in figures.items()}
