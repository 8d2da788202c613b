"""Globs of files: `*`, `?` and `[...]` within a name, and `**` for any number of folders.

The time to match is at most that of comparing every part of the pattern with every part of the path. A translation of
the whole pattern to a regular expression would take exponential time for some patterns, and patterns come from
strangers.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self

_FOLDERS = "**"
_MOST_CACHED = 1024
"""Maximum number of compiled names of patterns."""


class GlobError(ValueError):
    """A text is no glob."""


class Glob(NamedTuple):
    """A glob of paths.

    Attributes:
        parts: What each part of a path must match, from one slash to the next; None stands for any number of parts.
    """

    parts: tuple[re.Pattern[str] | None, ...]

    @classmethod
    def of(cls, pattern: str) -> Self:
        """Read a glob; a `**` at the end matches all files below a folder.

        Raises:
            GlobError: `**` is next to other characters.
        """
        return cls(tuple(_parts(pattern.split("/"))))

    def matches(self, path: str) -> bool:
        names, parts = path.split("/"), self.parts
        name = part = 0
        # where to continue if the rest does not match: the last `**` takes one more name
        again: tuple[int, int] | None = None
        while name < len(names):
            wanted = parts[part] if part < len(parts) else None
            if part < len(parts) and wanted is None:
                part += 1
                again = (name + 1, part)
            elif wanted is not None and wanted.match(names[name]):
                name, part = name + 1, part + 1
            elif again is not None:
                # Earlier `**` need not take more: what is between two of them matched as early as possible.
                name, part = again
                again = (name + 1, part)
            else:
                return False
        return all(rest is None for rest in parts[part:])

    def may_match_below(self, folder: str) -> bool:
        """Whether the glob can match a path below a folder: a beginning of the glob matches the folder."""
        return any(Glob(self.parts[:count]).matches(folder) for count in range(1, len(self.parts)))


def _parts(names: list[str]) -> Iterator[re.Pattern[str] | None]:
    for number, name in enumerate(names):
        if name != _FOLDERS:
            if _FOLDERS in name:
                raise GlobError(f"`**` stands alone between slashes, unlike in {name!r}; write *, or folder/**/*.txt")
            yield _name_pattern(name)
        elif number == len(names) - 1:
            yield from (None, _name_pattern("*"))
        else:
            yield None


@functools.lru_cache(_MOST_CACHED)
def _name_pattern(name: str) -> re.Pattern[str]:
    """Regular expression of a part without slashes.

    Its groups are atomic, so it never tries two ways to divide a name.
    """
    return re.compile(fnmatch.translate(name))


def matches_any(globs: Iterable[Glob], path: str) -> bool:
    return any(each.matches(path) for each in globs)
