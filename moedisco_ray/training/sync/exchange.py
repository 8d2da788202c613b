"""The files of sync points: members and coordinator exchange weights through storage that all of them see.

DIRECTORY/sync-0007/
├── members/NAME/       a member's weights, and `member.json` with its `MemberRecord`. It appears when complete. It is
│                       deleted when this sync point is complete; for a late member, when the next one is complete
├── common/             the common weights, float32; the last two are kept
├── momentum/           momentum of the outer step, float32; the last two are kept
└── sync.json           tokens of each member that took part, and the late members; completes the sync point

The folders are committed like artifacts: their manifests have a checksum per file, which is verified before the file is
read.

The weights are the backbone or the whole model, as `SyncPlan.scope` says. Sync point 0 is the start model of all
members. Every process may die at any time: a restarted member publishes bit-identical weights, and a restarted
coordinator computes the result again unless `sync.json` exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.store.artifacts import commit, read_json, reporting_full_disk, write_json
from moedisco_ray.core.store.checksums import with_checksum, without_checksum
from moedisco_ray.core.store.manifests import MANIFEST, MEMBERS, SYNCED, files_in
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.models import BACKBONE, Checkpoint, open_checkpoint, write_checkpoint
from moedisco_ray.policies.sync_points import SyncMembers, token_weights
from moedisco_ray.training.sync.outer_step import next_common, next_momentum

_MEMBER = "member.json"
_KEPT = 2
"""Number of sync points whose tensors are kept. The latest is not enough, because a late member may still read the one
before."""


@dataclasses.dataclass(frozen=True)
class MemberRecord:
    """The state of a member at a sync point.

    Attributes:
        step: Steps made.
        tokens: Tokens that the member has trained on since it last loaded common weights.
    """

    step: int
    tokens: int


def latest(directory: Path, known: int = 0, store: RunStore = SHARED) -> int:
    """Number of the latest completed sync point, searched upwards from `known`; 0 if no sync point is completed."""
    while is_complete(directory, known + 1, store):
        known += 1
    return known


def is_complete(directory: Path, number: int, store: RunStore = SHARED) -> bool:
    """Whether a sync point is completed; sync point 0 always is."""
    return number == 0 or store.has(_folder(directory, number) / SYNCED)


def publish(
    directory: Path,
    number: int,
    name: str,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    record: MemberRecord,
    store: RunStore = SHARED,
    stage: str = "",
) -> None:
    """Publish a member's weights for a sync point, unless they are published already.

    Args:
        directory: Directory of all sync points.
        number: Sync point that the member has reached.
        name: Name of the member.
        tensors: The member's weights under canonical names.
        config: The `config.json` of the member's model.
        record: The member's state.
        store: Store of the run.
        stage: Stage that trains the member.

    Raises:
        RunDirError: The disk is full.
    """
    target = _folder(directory, number) / MEMBERS / name
    if store.has(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with commit(target, "", store, stage) as draft:
        write_checkpoint(draft.path, tensors, config)
        write_json(draft.path / _MEMBER, dataclasses.asdict(record))


def has_published(directory: Path, number: int, name: str, store: RunStore = SHARED) -> bool:
    """Whether a member has published its weights for a sync point."""
    return store.has(_folder(directory, number) / MEMBERS / name)


def open_common(directory: Path, number: int, store: RunStore = SHARED) -> Checkpoint:
    """The common weights of a completed sync point.

    Raises:
        DamagedError: A file of them is damaged.
    """
    common = common_directory(directory, number)
    store.fetch(common)
    return open_checkpoint(common)


def common_directory(directory: Path, number: int) -> Path:
    """Directory of the common weights of a completed sync point; only the last two exist."""
    return _folder(directory, number) / "common"


def combine(
    directory: Path,
    number: int,
    start: Path,
    ready: SyncMembers,
    outer: Outer,
    *,
    store: RunStore = SHARED,
    stage: str = "",
) -> None:
    """Combine the members' weights by an outer optimizer step, and complete the sync point.

    Args:
        directory: Directory of all sync points.
        number: Number of this sync point.
        start: Start model of all members, read at sync point 1.
        ready: Members to combine.
        outer: Settings of the outer optimizer step.
        store: Store of the run.
        stage: Stage that trains the members.

    Raises:
        DamagedError: What a member or the last sync point has written is damaged.
        RunDirError: The disk is full.
    """
    folder, previous = _folder(directory, number), _folder(directory, number - 1)
    before_files = [start, start.parent / BACKBONE] if number == 1 else [previous / "common", previous / "momentum"]
    homes = [folder / MEMBERS / name for name in ready.members]
    store.fetch(*homes, *before_files)
    members = [open_checkpoint(home) for home in homes]
    tokens = [MemberRecord(**read_json(home / _MEMBER)).tokens for home in homes]
    names, config = list(members[0]), members[0].config
    first = number == 1
    before = _Float32(open_checkpoint(start if first else common_directory(directory, number - 1)), names)
    momentum = None if first else open_checkpoint(previous / "momentum")
    with commit(folder / "momentum", "", store, stage) as draft:
        write_checkpoint(draft.path, next_momentum(before, members, token_weights(tokens), momentum, outer), config)
    after = open_checkpoint(folder / "momentum")
    with commit(folder / "common", "", store, stage) as draft:
        write_checkpoint(draft.path, next_common(before, momentum, after, outer), config)
    sizes = [_published_bytes(home) for home in homes]
    with reporting_full_disk(folder):
        write_json(
            folder / SYNCED,
            with_checksum(
                {
                    "members": dict(zip(ready.members, tokens, strict=True)),
                    "late": list(ready.late),
                    "bytes": dict(zip(ready.members, sizes, strict=True)),
                }
            ),
        )
    store.publish(folder / SYNCED)
    # Late members keep their folders: they may be writing them now.
    for home in homes:
        store.remove(home, objects=True)
    store.remove(previous / MEMBERS)
    with contextlib.suppress(OSError):
        (folder / MEMBERS).rmdir()
    for part in ("momentum", "common"):
        store.remove(_folder(directory, number - _KEPT) / part, objects=True)


def history(directory: Path, store: RunStore = SHARED, stage: str = "") -> list[dict[str, Any]]:
    """One record per completed sync point: `members` (tokens by name), `late` (names) and `bytes` (by name).

    Args:
        directory: Directory of all sync points, on this machine.
        store: Store of the run, for the error.
        stage: Stage that trains the members, for the error.

    Raises:
        DamagedError: A record is damaged.
    """
    return [_record(_folder(directory, number) / SYNCED, store, stage) for number in range(1, latest(directory) + 1)]


def _record(path: Path, store: RunStore, stage: str) -> dict[str, Any]:
    try:
        return without_checksum(path.read_bytes())
    except ValueError as error:
        raise DamagedError(store.name_of(path) or path.name, stage, str(store.location)) from error


class _Float32(Mapping[str, Tensor]):
    """Some tensors of a checkpoint, in float32."""

    def __init__(self, source: Checkpoint, names: Sequence[str]) -> None:
        self._source = source
        self._names = names

    def __getitem__(self, key: str) -> Tensor:
        return self._source[key].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _published_bytes(home: Path) -> int:
    return sum(path.stat().st_size for path in files_in(home) if path.name != MANIFEST)


def _folder(directory: Path, number: int) -> Path:
    return directory / f"sync-{number:04d}"
