"""Folders that Hugging Face `save_to_disk` wrote: which Arrow files they are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from moedisco_ray.core.errors import CorpusError

NOTES = frozenset({"state.json", "dataset_info.json", "dataset_dict.json"})
"""Names of the files that `save_to_disk` writes next to and above the Arrow files."""


def data_files(system: Any, field: str, path: str, found: Sequence[str]) -> list[str] | None:
    """Paths of the Arrow files that the data sets in a folder are made of, in their order; None where it holds none.

    Args:
        system: Opens the files.
        field: The configuration path of the source; errors name it.
        path: The folder, as configured.
        found: Paths of all files below it.

    Raises:
        CorpusError: It holds several splits, and none of them is `train`.
        OSError: A `state.json` cannot be read.
    """
    states = {each: named for each in found if _name(each) == "state.json" and (named := _named(system, each)) is not None}
    dictionaries = [each for each in found if _name(each) == "dataset_dict.json"]
    if dictionaries and states:
        splits = {PurePosixPath(each).parent.name: each for each in states}
        if "train" not in splits:
            folder, listed = PurePosixPath(dictionaries[0]).parent, ", ".join(sorted(splits))
            raise CorpusError(f"{field}.path", path, f"holds the splits {listed}; name one, as {folder.name}/SPLIT")
        states = {splits["train"]: states[splits["train"]]}
    if not states:
        return None
    return [str(PurePosixPath(state).parent / name) for state, named in states.items() for name in named]


def _named(system: Any, state: str) -> list[str] | None:
    """The file names in a data set's `state.json`; None where it is another program's."""
    with system.open_input_stream(state) as stream:
        data = stream.read()
    try:
        content = json.loads(data)
    except ValueError:
        return None
    entries = content.get("_data_files") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return None
    names = [entry["filename"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("filename"), str)]
    return names if len(names) == len(entries) else None


def _name(path: str) -> str:
    return PurePosixPath(path).name
