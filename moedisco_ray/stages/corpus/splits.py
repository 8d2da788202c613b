"""Find the files of a split of a data set, by its card or by their names, as Hugging Face `datasets` does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from moedisco_ray.core.globs import Glob, GlobError, matches_any

CARD = "README.md"
"""File with a data set's card, whose front matter may list the files of its subsets and splits."""
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of a split's files and folders; of another split, its name."""
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""Names that `datasets` gives the files of a split when it uploads a data set."""
_SEPARATORS = "-._ 0-9"


class SplitError(ValueError):
    """A data set has no such split or subset. The message says which it has."""


def files_of_split(names: Sequence[str], split: str, subset: str | None, card: str | None) -> set[str]:
    """The files of a split.

    Args:
        names: Paths of all files below the data set's folder.
        split: Name of the split.
        subset: Name of the subset; None for the default one.
        card: Text of the data set's card; None without one.

    Raises:
        SplitError: The data set has no such split or subset.
    """
    subsets = _subsets(card or "")
    if not subsets:
        if subset is not None:
            raise SplitError("its card lists no subsets; leave subset out")
        return _named_after(names, split)
    patterns = _patterns(subsets, split, subset)
    try:
        globs = [Glob.of(pattern) for pattern in patterns]
    except GlobError as error:
        raise SplitError(f"its card has a pattern that is no glob: {error}") from error
    found = {name for name in names if matches_any(globs, name)}
    if not found:
        raise SplitError(f"its card says that split {split!r} is in {', '.join(patterns)}, but there are no such files")
    return found


def _named_after(names: Sequence[str], split: str) -> set[str]:
    """The files that are named after a split, or in folders named after it; all are `train` if none has a name."""
    sharded: dict[str, set[str]] = {}
    for name in names:
        if match := _SHARD.fullmatch(name):
            sharded.setdefault(match[1], set()).add(name)
    if sharded:
        if split not in sharded:
            raise SplitError(f"has the splits {', '.join(sharded)}; name one of them")
        return sharded[split]
    for places in (_folders, _file_name):
        by_split = {each: _names_with(words, names, places) for each, words in _words(split).items()}
        if by_split[split]:
            return by_split[split]
        if any(by_split.values()):
            found = [each for each, named in by_split.items() if named]
            raise SplitError(f"has the splits {', '.join(found)}; name one of them")
    if split == "train":
        return set(names)
    raise SplitError("no file or folder is named after a split; leave split out")


def _subsets(card: str) -> list[Mapping[str, Any]]:
    """The subsets in the front matter of a dataset card, without those that list no files."""
    try:
        front = yaml.safe_load(card.removeprefix("---").partition("\n---")[0]) if card.startswith("---") else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that does not exist
        return []
    entries = front.get("configs") if isinstance(front, dict) else None
    return (
        [each for each in entries if isinstance(each, dict) and "data_files" in each]
        if isinstance(entries, list)
        else []
    )


def _patterns(subsets: Sequence[Mapping[str, Any]], split: str, subset: str | None) -> list[str]:
    names = [str(each.get("config_name", "default")) for each in subsets]
    if subset is not None:
        chosen = [each for each, name in zip(subsets, names, strict=True) if name == subset]
    else:
        default = [
            each for each, name in zip(subsets, names, strict=True) if each.get("default") is True or name == "default"
        ]
        chosen = default or list(subsets if len(subsets) == 1 else [])
    if not chosen:
        raise SplitError(f"has the subsets {', '.join(names)}; name one of them in subset")
    by_split = _by_split(chosen[0]["data_files"])
    if split not in by_split:
        raise SplitError(f"has the splits {', '.join(by_split)}; name one of them")
    return [pattern.removeprefix("./") for pattern in by_split[split]]


def _by_split(files: Any) -> dict[str, list[str]]:
    entries = files if isinstance(files, list) else [files]
    if all(isinstance(each, dict) for each in entries):
        return {str(each.get("split", "train")): _listed(each.get("path", [])) for each in entries}
    return {"train": [path for each in entries for path in _listed(each)]}


def _listed(paths: Any) -> list[str]:
    return [str(path) for path in paths] if isinstance(paths, list) else [str(paths)]


def _words(split: str) -> dict[str, tuple[str, ...]]:
    return {split: (split,), **_KEYWORDS}


def _folders(name: str) -> Iterator[str]:
    yield from PurePosixPath(name).parts[:-1]


def _file_name(name: str) -> Iterator[str]:
    yield PurePosixPath(name).name


def _names_with(words: Sequence[str], names: Sequence[str], places: Callable[[str], Iterator[str]]) -> set[str]:
    return {name for name in names if _mentions(places(name), words)}


def _mentions(places: Iterator[str], words: Sequence[str]) -> bool:
    """Whether one of the words stands alone in one of the names of files or folders."""
    word = "|".join(re.escape(each) for each in words)
    return any(re.search(rf"(?:^|[{_SEPARATORS}])(?:{word})(?:$|[{_SEPARATORS}])", place) for place in places)
