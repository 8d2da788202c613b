"""The files of rounds: how members and their keeper talk, through storage that all of them see.

ROUNDS/round-0007/
├── members/NAME/       the backbone that a member ended the round with, and `post.json`: its step, and its tokens since it
│                       last took one in; appears when complete, and goes when the round is closed, a late one's when the next is
├── backbone/           what they became, float32; goes when two newer ones are there, as does
├── momentum/           the outer step's
└── round.json          which members took part, and who was late; the round is closed once it is there

Round 0 is what all members start from. Every process may die anywhere: a member posts the same bits again, and the keeper
writes a result again unless `round.json` says that it is complete.
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
from moedisco_ray.models import Checkpoint, open_checkpoint, write_checkpoint
from moedisco_ray.policies.sync_points import SyncMembers, shares
from moedisco_ray.training.sync.outer_step import next_backbone, next_momentum

_CLOSED = "round.json"
_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Post:
    """What a member ended a round with.

    Attributes:
        step: Steps it has made.
        tokens: Tokens since it last took a backbone in.
    """

    step: int
    tokens: int


def newest(directory: Path, known: int = 0) -> int:
    """The last round that is closed, at least `known`; 0: none."""
    while (_home(directory, known + 1) / _CLOSED).exists():
        known += 1
    return known


def post(
    directory: Path, number: int, name: str, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], what: Post,
) -> None:
    """Lay down a member's backbone, unless it is there already.

    Args:
        directory: Of all rounds.
        number: The round that it ends.
        name: The member.
        tensors: Its backbone, under canonical names.
        config: Its model's `config.json`.
        what: Goes with it.

    Raises:
        RunDirError: The disk is full.
    """
    target = _home(directory, number) / "members" / name
    if target.exists():
        return
    draft = target.with_name(f".{name}.draft")
    with _full_disk_told(draft):
        shutil.rmtree(draft, ignore_errors=True)
        write_checkpoint(draft, tensors, config)
        write_json(draft / "post.json", dataclasses.asdict(what))
        draft.rename(target)


def has_posted(directory: Path, number: int, name: str) -> bool:
    """Whether a member's backbone of a round is there."""
    return (_home(directory, number) / "members" / name).exists()


def backbone(directory: Path, number: int) -> Checkpoint:
    """What a closed round made."""
    return open_checkpoint(backbone_path(directory, number))


def backbone_path(directory: Path, number: int) -> Path:
    """Where a closed round's backbone is, of the newest two."""
    return _home(directory, number) / "backbone"


def close(directory: Path, number: int, start: Path, gathering: SyncMembers, outer: Outer) -> None:
    """Make the outer step and close the round.

    Args:
        directory: Of all rounds.
        number: Of this one.
        start: The model that all members began from, read in round 1.
        gathering: Whom to combine.
        outer: The recipe.

    Raises:
        RunDirError: The disk is full.
    """
    home, last = _home(directory, number), _home(directory, number - 1)
    members = [open_checkpoint(home / "members" / name) for name in gathering.members]
    tokens = [Post(**read_json(home / "members" / name / "post.json")).tokens for name in gathering.members]
    names, config = list(members[0]), members[0].config
    first = number == 1
    before = _Float32(open_checkpoint(start if first else backbone_path(directory, number - 1)), names)
    momentum = None if first else open_checkpoint(last / "momentum")
    for part in ("momentum", "backbone"):
        shutil.rmtree(home / part, ignore_errors=True)
    with _full_disk_told(home / "backbone"):
        write_checkpoint(home / "momentum", next_momentum(before, members, shares(tokens), momentum, outer), config)
        after = open_checkpoint(home / "momentum")
        write_checkpoint(home / "backbone", next_backbone(before, momentum, after, outer), config)
        write_json(home / _CLOSED, {"members": dict(zip(gathering.members, tokens, strict=True)), "late": list(gathering.late)})
    # Not those who are late: they may be laying theirs down at this moment.
    for left in (*(home / "members" / name for name in gathering.members), last / "members"):
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):
        (home / "members").rmdir()
    for part in ("momentum", "backbone"):
        shutil.rmtree(_home(directory, number - _KEPT) / part, ignore_errors=True)


def history(directory: Path) -> list[dict[str, Any]]:
    """Of each closed round: `members`, their tokens by name, and `late`, names."""
    return [read_json(_home(directory, number) / _CLOSED) for number in range(1, newest(directory) + 1)]


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


def _home(directory: Path, number: int) -> Path:
    return directory / f"round-{number:04d}"


@contextlib.contextmanager
def _full_disk_told(draft: Path) -> Iterator[None]:
    try:
        with reporting_full_disk(draft):
            yield
    except (OSError, RunDirError):
        shutil.rmtree(draft, ignore_errors=True)
        raise
