"""The files of sync points, in storage that all members and the coordinator reach.

DIRECTORY/sync-0007/
├── members/NAME.bin       a member's weights, laid end to end
├── members/NAME.json      its `Arrival`; written last
├── members/roster.json    the members that are combined, with their arrivals, and the late ones; written before anyone
│                          combines. The folder is deleted when the sync point is complete; what a late member writes
│                          afterwards, when the next one is
├── common/0003.bin        a range of the common weights, in float32; the last two sync points keep theirs
├── common/layout.json     names and shapes of the weights, and the `config.json` of the members' models
├── momentum/0003.bin      a range of the outer step's momentum, in float32; the last two sync points keep theirs
├── update/0003.bin        with `SyncPlan.bits`: codes of what a range of the common weights has changed by
├── residual/0003.bin      with `SyncPlan.bits`: what these codes have lost, in float32; both are kept as long
└── sync.json              tokens of each member that took part, the late members, and the checksums of all ranges;
                           completes the sync point

The weights are the backbone or the whole model, as `SyncPlan.scope` says. With `SyncPlan.bits` a member publishes codes
of what they have changed by instead (see `coded`), and there is no momentum if the outer step has none. Sync point 0 is
the start model of all members. Every process may die at any time: a restarted member publishes the same weights, on a
GPU up to rounding, and a range that is combined by the recorded roster has the same bits on every member. So ranges are
combined again, unless `sync.json` exists.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.store.checksums import Entry, in_threads, with_checksum, without_checksum
from moedisco_ray.core.store.manifests import (
    CODED,
    COMBINED,
    FILES,
    KEPT_SYNCS,
    MEMBERS,
    ROSTER,
    SYNCED,
    as_json,
    entries_of,
)
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.core.store.written import read_part, writing
from moedisco_ray.policies.sync_points import Arrival, SyncMembers, range_bounds
from moedisco_ray.training.sync.layout import Layout, as_bytes

COMMON, MOMENTUM = COMBINED
UPDATE, RESIDUAL = CODED
LAYOUT = f"{COMMON}/layout.json"


@dataclasses.dataclass(frozen=True)
class Roster:
    """The recorded members of a sync point: who is combined, in which order.

    Attributes:
        members: Arrivals of the members, in the order in which their weights are summed.
        late: Names of the members that the sync does not wait for.
        ranges: Number of ranges into which the weights are divided.
    """

    members: tuple[Arrival, ...]
    late: tuple[str, ...]
    ranges: int


@dataclasses.dataclass(frozen=True)
class SyncPoint:
    """The files of one sync point.

    Attributes:
        directory: Directory of all sync points.
        number: Number of this one, from 1; 0 is the start model.
        store: Store of the run.
        stage: Stage that trains the members.
    """

    directory: Path
    number: int
    store: RunStore = SHARED
    stage: str = ""

    @property
    def previous(self) -> SyncPoint:
        """The sync point before this one."""
        return dataclasses.replace(self, number=self.number - 1)

    @property
    def is_complete(self) -> bool:
        """Whether the common weights exist; sync point 0 always is complete."""
        return self.number == 0 or self.store.has(self.path(SYNCED))

    def latest(self) -> SyncPoint:
        """The latest completed sync point, searched upwards from this one, which is complete."""
        found = self
        while (following := dataclasses.replace(found, number=found.number + 1)).is_complete:
            found = following
        return found

    def path(self, name: str) -> Path:
        return self.directory / f"sync-{self.number:04d}" / name

    def damaged(self, name: str) -> DamagedError:
        """The error for a file that is not what its writer stored."""
        path = self.path(name)
        return DamagedError(self.store.name_of(path) or path.name, self.stage, str(self.store.location))

    def read(self, name: str) -> dict[str, Any]:
        """The values of a JSON file.

        Raises:
            DamagedError: The file is damaged or missing.
        """
        try:
            return without_checksum(self.store.read_in_place(self.path(name), _content))
        except (OSError, ValueError) as error:
            raise self.damaged(name) from error

    def write(self, name: str, values: Mapping[str, Any]) -> Entry:
        """Write a JSON file with a checksum, and return its entry."""
        content = as_json(with_checksum(values))
        with writing(self.store, self.path(name)) as file:
            file.write(content)
        return Entry(len(content), hashlib.sha256(content).hexdigest())

    def publish(self, name: str, tensors: Mapping[str, Tensor], ranges: int, tokens: int) -> Arrival:
        """Publish a member's weights, unless they are published already.

        Args:
            name: Name of the member.
            tensors: The member's weights under canonical names, in order.
            ranges: Number of ranges into which the weights are divided.
            tokens: Tokens that the member has trained on since it last loaded common weights.

        Raises:
            RunDirError: The disk is full.
        """
        layout = Layout.of(tensors)
        bounds = [tuple(map(layout.offset, each)) for each in range_bounds(layout.elements, ranges)]
        return self.publish_bytes(name, map(as_bytes, tensors.values()), [b - a for a, b in bounds], tokens)

    def publish_bytes(self, name: str, pieces: Iterable[memoryview], sizes: Sequence[int], tokens: int) -> Arrival:
        """Publish a member's bytes, unless they are published already.

        Args:
            name: Name of the member.
            pieces: The bytes; none are taken if they are published already.
            sizes: Size of each range (bytes).
            tokens: Tokens that the member has trained on since it last loaded common weights.

        Raises:
            RunDirError: The disk is full.
        """
        found = self.arrival(name)
        if found is not None:
            return found
        with writing(self.store, self.path(f"{MEMBERS}/{name}.bin")) as file:
            entries = _write_ranges(file.write, pieces, sizes)
        self.write(f"{MEMBERS}/{name}.json", {"tokens": tokens, "ranges": entries})
        return Arrival(name, self.number, tokens, entries)

    def arrival(self, name: str) -> Arrival | None:
        """What a member has published; None if it has not published all of it."""
        if not self.store.has(self.path(f"{MEMBERS}/{name}.json")):
            return None
        return self._arrival(name, self.read(f"{MEMBERS}/{name}.json"))

    def arrivals(self, names: Sequence[str]) -> list[Arrival]:
        """What some members have published."""
        return [found for found in in_threads(self.arrival, names) if found is not None]

    def record_roster(self, ready: SyncMembers, arrivals: Mapping[str, Arrival], ranges: int) -> Roster:
        """Record which members are combined, before anyone combines."""
        roster = Roster(tuple(arrivals[name] for name in ready.members), ready.late, ranges)
        members = {each.name: {"tokens": each.tokens, "ranges": each.ranges} for each in roster.members}
        self.write(f"{MEMBERS}/{ROSTER}", {"members": members, "late": ready.late, "ranges": ranges})
        return roster

    @property
    def has_roster(self) -> bool:
        """Whether the members of this sync point are recorded."""
        return self.store.has(self.path(f"{MEMBERS}/{ROSTER}"))

    def roster(self) -> Roster:
        """The recorded members.

        Raises:
            DamagedError: The record is damaged or missing.
        """
        values = self.read(f"{MEMBERS}/{ROSTER}")
        members = tuple(self._arrival(name, each) for name, each in values["members"].items())
        return Roster(members, tuple(values["late"]), values["ranges"])

    def combined(self) -> dict[str, Entry]:
        """Entries of the common weights and the momentum, by name in the folder of this completed sync point.

        Raises:
            DamagedError: The record is damaged.
        """
        return entries_of(self.read(SYNCED))

    def has_combined(self, name: str) -> bool:
        """Whether the weights of a member were combined at this completed sync point.

        Raises:
            DamagedError: The record is damaged.
        """
        return name in self.read(SYNCED)["members"]

    def complete(self, roster: Roster, files: Mapping[str, Entry]) -> None:
        """Complete the sync point whose ranges are all combined.

        Raises:
            RunDirError: The disk is full.
        """
        self.write(
            SYNCED,
            {
                "members": {each.name: each.tokens for each in roster.members},
                "late": roster.late,
                "bytes": {each.name: each.nbytes for each in roster.members},
                "ranges": roster.ranges,
                FILES: files,
            },
        )

    def clean_up(self) -> None:
        """Delete what no one reads any more, once the sync point is complete."""
        for point in (self, self.previous):
            self.store.remove(point.path(MEMBERS))
        for kind in (*COMBINED, *CODED):
            self.store.remove(dataclasses.replace(self, number=self.number - KEPT_SYNCS).path(kind))

    def _arrival(self, name: str, values: Mapping[str, Any]) -> Arrival:
        ranges = tuple((int(size), str(sha256)) for size, sha256 in values["ranges"])
        return Arrival(name, self.number, int(values["tokens"]), ranges)


class RangeReader:
    """Reads one range of a file in consecutive pieces, and verifies it after the last one.

    Args:
        point: The sync point.
        name: Name of the file in the sync point's folder.
        offset: First byte of the range.
        entry: Size and SHA-256 of the range.
    """

    def __init__(self, point: SyncPoint, name: str, offset: int, entry: Entry) -> None:
        self._point, self._name, self._offset, self._entry = point, name, offset, entry
        self._digest, self._size = hashlib.sha256(), 0

    @property
    def size(self) -> int:
        """Size of the range (bytes)."""
        return self._entry.size

    def read(self, offset: int, target: Tensor) -> Tensor:
        """Fill a tensor from a byte of the range on; threads may call this at the same time.

        Raises:
            DamagedError: The file ends before, or is missing.
        """
        buffer = as_bytes(target)
        try:
            filled = read_part(self._point.store, self._point.path(self._name), self._offset + offset, buffer)
        except FileNotFoundError as error:
            raise self._point.damaged(self._name) from error
        if filled < len(buffer):
            raise self._point.damaged(self._name)
        return target

    def count(self, piece: Tensor) -> Tensor:
        """Add the next piece to the checksum."""
        self._digest.update(as_bytes(piece))
        self._size += piece.nbytes
        return piece

    def check(self) -> None:
        """Verify the range, after all of it has been counted.

        Raises:
            DamagedError: The file is not what its writer stored.
        """
        if (self._size, self._digest.hexdigest()) != (self._entry.size, self._entry.sha256):
            raise self._point.damaged(self._name)


def history(directory: Path, store: RunStore = SHARED, stage: str = "") -> list[dict[str, Any]]:
    """One record per completed sync point: `members` (tokens by name), `late` (names) and `bytes` (by name).

    Args:
        directory: Directory of all sync points.
        store: Store of the run.
        stage: Stage that trains the members.

    Raises:
        DamagedError: A record is damaged.
    """
    points = [
        SyncPoint(directory, number, store, stage)
        for number in range(1, SyncPoint(directory, 0, store).latest().number + 1)
    ]

    def read(point: SyncPoint) -> dict[str, Any]:
        record = point.read(SYNCED)
        return {key: record[key] for key in ("members", "late", "bytes")}

    return in_threads(read, points)


def _write_ranges(
    write: Callable[[memoryview], Any], pieces: Iterable[memoryview], sizes: Sequence[int]
) -> tuple[tuple[int, str], ...]:
    """Write bytes, and return the size and SHA-256 of each of the ranges into which they are divided."""
    digests, place, left = [hashlib.sha256() for _ in sizes], 0, sizes[0]
    for piece in pieces:
        write(piece)
        rest = piece
        while len(rest):
            while not left:
                place += 1
                left = sizes[place]
            digests[place].update(rest[:left])
            left, rest = left - len(rest[:left]), rest[left:]
    return tuple((size, digest.hexdigest()) for size, digest in zip(sizes, digests, strict=True))


def _content(source: Any) -> bytes:
    content: bytes = source.read_bytes() if isinstance(source, Path) else source.read()
    return content
