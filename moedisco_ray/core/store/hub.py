"""Names of models of the Hugging Face hub: `hf://ORG/NAME`, or `hf://ORG/NAME@REVISION`.

Nothing here reaches the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

HUB = "hf://"

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART})/{_PART}")
_PLACE = re.compile(rf"{HUB}({_PART}/{_PART})(?:@(.+))?")
_DATASET = re.compile(rf"{HUB}datasets/({_PART}/{_PART})(?=[@/]|$)")
_NO_NAME = re.compile(r"\.\.|--|\.(?:git|gguf)$")
_OTHER_REPOSITORIES = ("datasets", "spaces", "buckets", "kernels")
"""First parts of an `hf://` URI that is no model's."""
REVISION = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"
"""Pattern of a branch, a tag or a commit."""


def is_hub(place: object) -> bool:
    """Whether a place is at the hub, and no directory or other URI."""
    return isinstance(place, str) and place.startswith(HUB)


def is_hub_name(text: object) -> bool:
    """Whether a text can be the name of a model at the hub, such as `org/name`; it may also be a relative path."""
    match = _NAME.fullmatch(str(text)) if isinstance(text, str | Path) else None
    return match is not None and match[1] not in _OTHER_REPOSITORIES and _NO_NAME.search(str(text)) is None


def hub_parts(place: str) -> tuple[str, str | None]:
    """The name of a model at the hub, and its revision, if the place has one.

    Raises:
        ValueError: The place names no model of the hub.
    """
    match = _PLACE.fullmatch(place)
    if match is None or not is_hub_name(match[1]):
        raise ValueError(f"{place!r} names no model of the hub")
    return match[1], match[2]


def dataset_name(path: str) -> str | None:
    """Name of the data set of the hub that a source's path is in, such as `org/name`; None for any other path."""
    match = _DATASET.match(path)
    return None if match is None else match[1]


def hub_cache() -> Path:
    """Folder of the files that huggingface_hub has downloaded on this machine: HF_HUB_CACHE, or `hub` in HF_HOME."""
    named = os.environ.get("HF_HUB_CACHE")
    return Path(named).absolute() if named else _hub_home() / "hub"


def private_places(roots: Iterable[Path]) -> list[Path]:
    """Places of huggingface_hub on this machine that strangers must not read.

    Args:
        roots: Directories that an operator allows. A folder of the hub is private unless one of them is inside. Tokens
            always are.
    """
    home, cache = Path(os.path.realpath(_hub_home())), Path(os.path.realpath(hub_cache()))
    token = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").absolute()
    allowed = [Path(os.path.realpath(root)) for root in roots]
    folders = [folder for folder in (home, cache) if not _is_opened(folder, home, allowed)]
    return [token, token.with_name("stored_tokens"), *folders]


def _is_opened(folder: Path, home: Path, roots: Iterable[Path]) -> bool:
    """Whether an operator's root opens a folder of the hub; the home itself opens the cache in it too."""
    return any(
        root.is_relative_to(folder) or (root.is_relative_to(home) and folder.is_relative_to(root)) for root in roots
    )


def _hub_home() -> Path:
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HF_HOME") or Path(user) / "huggingface").absolute()


def hub_folder(place: str) -> Path:
    """Folder of all downloaded files of one model of the hub."""
    return hub_cache() / f"models--{hub_parts(place)[0].replace('/', '--')}"
