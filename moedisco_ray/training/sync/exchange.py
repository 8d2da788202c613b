"""The files of sync points: members and coordinator exchange weights through storage that all of them see.

DIRECTORY/sync-0007/
├── members/NAME/       a member's weights, and `member.json` with its `MemberRecord`. It appears when it is complete. It is
│                       deleted when this sync point is complete, or, for a late member, when the next sync point is complete
├── common/             the common weights, float32; the last two are kept
├── momentum/           momentum of the outer step, float32; the last two are kept
└── sync.json           tokens of each member that took part, and the late members; its existence completes the sync point

The weights are the backbone or the whole model, as `SyncPlan.scope` says. Sync point 0 is the start model of all members. Every
process may die at any time: a restarted member publishes bit-identical weights, and a restarted coordinator computes the result
again unless `sync.json` exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moedisco_ray.core.artifacts import read_json, reporting_full_disk, write_json
from moedisco_ray.core.config import Outer
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.manifests import files_in
from moedisco_ray.core.run_store import SHARED, RunStore
from moedisco_ray.models import BACKBONE, Checkpoint, open_checkpoint, write_checkpoint
from moedisco_ray.policies.sync_points import SyncMembers, token_weights
from moedisco_ray.training.sync.outer_step import next_common, next_momentum

_COMPLETE = "sync.json"
_MEMBER = "member.json"
_KEPT = 2
"""Number of sync points whose tensors are kept. The latest is not enough, because a late member may still read the one before."""


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
    while store.has(_folder(directory, known + 1) / _COMPLETE):
        known += 1
    return known


def publish(
    directory: Path, number: int, name: str, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any],
    record: MemberRecord, store: RunStore = SHARED,
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

    Raises:
        RunDirError: The disk is full.
    """
    target = _folder(directory, number) / "members" / name
    if store.has(target):
        return
    draft = target.with_name(f".{name}.draft")
    with _removing_on_error(draft):
        shutil.rmtree(draft, ignore_errors=True)
        write_checkpoint(draft, tensors, config)
        write_json(draft / _MEMBER, dataclasses.asdict(record))
        shutil.rmtree(target, ignore_errors=True)   # an attempt that died before `store.publish` may have left it
        draft.rename(target)
        store.publish(target)


def has_published(directory: Path, number: int, name: str, store: RunStore = SHARED) -> bool:
    """Whether a member has published its weights for a sync point."""
    return store.has(_folder(directory, number) / "members" / name)


def open_common(directory: Path, number: int, store: RunStore = SHARED) -> Checkpoint:
    """The common weights of a completed sync point."""
    common = common_directory(directory, number)
    store.fetch(common)
    return open_checkpoint(common)


def common_directory(directory: Path, number: int) -> Path:
    """Directory of the common weights of a completed sync point; only the last two exist."""
    return _folder(directory, number) / "common"


def combine(directory: Path, number: int, start: Path, ready: SyncMembers, outer: Outer, *, store: RunStore = SHARED) -> None:
    """Combine the members' weights by an outer optimizer step, and complete the sync point.

    Args:
        directory: Directory of all sync points.
        number: Number of this sync point.
        start: Start model of all members, read at sync point 1.
        ready: Members to combine.
        outer: Settings of the outer optimizer step.
        store: Store of the run.

    Raises:
        RunDirError: The disk is full.
    """
    folder, previous = _folder(directory, number), _folder(directory, number - 1)
    before_files = [start, start.parent / BACKBONE] if number == 1 else [previous / "common", previous / "momentum"]
    store.fetch(*(folder / "members" / name for name in ready.members), *before_files)
    members = [open_checkpoint(folder / "members" / name) for name in ready.members]
    tokens = [MemberRecord(**read_json(folder / "members" / name / _MEMBER)).tokens for name in ready.members]
    names, config = list(members[0]), members[0].config
    first = number == 1
    before = _Float32(open_checkpoint(start if first else common_directory(directory, number - 1)), names)
    momentum = None if first else open_checkpoint(previous / "momentum")
    for part in ("momentum", "common"):
        shutil.rmtree(folder / part, ignore_errors=True)
    with _removing_on_error(folder / "common"):
        write_checkpoint(folder / "momentum", next_momentum(before, members, token_weights(tokens), momentum, outer), config)
        after = open_checkpoint(folder / "momentum")
        write_checkpoint(folder / "common", next_common(before, momentum, after, outer), config)
        store.publish(folder / "momentum", folder / "common")
        sizes = [sum(path.stat().st_size for path in files_in(folder / "members" / name)) for name in ready.members]
        write_json(folder / _COMPLETE, {
            "members": dict(zip(ready.members, tokens, strict=True)), "late": list(ready.late),
            "bytes": dict(zip(ready.members, sizes, strict=True))})
        store.publish(folder / _COMPLETE)
    # Late members keep their folders: they may be writing them now.
    for name in ready.members:
        store.remove(folder / "members" / name, objects=True)
    store.remove(previous / "members")
    with contextlib.suppress(OSError):
        (folder / "members").rmdir()
    for part in ("momentum", "common"):
        store.remove(_folder(directory, number - _KEPT) / part, objects=True)


def history(directory: Path) -> list[dict[str, Any]]:
    """One record per completed sync point: `members` (tokens by name) and `late` (names)."""
    return [read_json(_folder(directory, number) / _COMPLETE) for number in range(1, latest(directory) + 1)]


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


def _folder(directory: Path, number: int) -> Path:
    return directory / f"sync-{number:04d}"


@contextlib.contextmanager
def _removing_on_error(draft: Path) -> Iterator[None]:
    try:
        with reporting_full_disk(draft):
            yield
    except (OSError, RunDirError):
        shutil.rmtree(draft, ignore_errors=True)
        raise
