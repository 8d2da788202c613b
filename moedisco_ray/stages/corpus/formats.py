"""File formats: detect them by file endings, and find the Arrow files of data sets that `save_to_disk` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.limits import COMPRESSED, PARQUET

FileFormat = Literal["text", "jsonl", "csv", "tsv", "parquet", "arrow"]

NOTES = frozenset({"state.json", "dataset_info.json", "dataset_dict.json"})
"""Names of the metadata files that `save_to_disk` writes next to and above the Arrow files."""
_ROWS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    **dict.fromkeys(PARQUET, "parquet"),
    ".arrow": "arrow",
}
_TEXT = (
    ".txt",
    ".text",
    ".md",
    ".markdown",
    ".rst",
    ".adoc",
    ".org",
    ".tex",
    ".log",
    ".srt",
    ".po",
    ".py",
    ".pyi",
    ".pyx",
    ".pxd",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".cxx",
    ".hpp",
    ".cu",
    ".cuh",
    ".m",
    ".mm",
    ".cs",
    ".fs",
    ".swift",
    ".go",
    ".rs",
    ".java",
    ".kt",
    ".scala",
    ".js",
    ".mjs",
    ".jsx",
    ".ts",
    ".tsx",
    ".css",
    ".rb",
    ".php",
    ".pl",
    ".lua",
    ".r",
    ".jl",
    ".hs",
    ".ml",
    ".clj",
    ".ex",
    ".erl",
    ".lisp",
    ".el",
    ".lean",
    ".f90",
    ".s",
    ".v",
    ".sql",
    ".proto",
    ".cmake",
    ".sh",
    ".bash",
    ".ps1",
    ".bat",
    ".yaml",
    ".yml",
    ".toml",
    ".ini",
    ".cfg",
    ".conf",
)
_INSTEAD = {
    **dict.fromkeys((".warc", ".wet", ".wat"), "is a web archive; extract its text first, for example as JSONL"),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".xml"), "is markup; extract its text first"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar", ".xz"), "is an archive; unpack it first"),
    **dict.fromkeys(
        (".pdf", ".epub", ".docx", ".doc", ".odt", ".rtf", ".xlsx"), "is a formatted document; extract its text first"
    ),
}


def format_of(path: str) -> FileFormat | None:
    """Format of a file by its ending; None if the ending is unknown. A name without an ending means plain text."""
    ending = _ending(path)
    return "text" if not ending or ending in _TEXT else _ROWS.get(ending)


def unknown(path: str) -> str:
    """Reason why a file with an unknown ending is not read, as the end of a sentence that begins with its name."""
    ending = _ending(path)
    return _INSTEAD.get(ending, f"has the unknown ending {ending}")


def refusal(path: str) -> str:
    """Reason why a file with an unknown ending is not read (`unknown`), followed by the remedy."""
    return (
        f"{unknown(path)}; leave it out by `exclude` or on_error: skip, or read it as plain text by format: text. "
        f"Known endings: {' '.join((*_ROWS, *_TEXT))}"
    )


def data_files(system: Any, field: str, path: str, found: Sequence[str]) -> list[str] | None:
    """Paths of the Arrow files of the saved data sets in a folder, in order; None if the folder holds no data set.

    Args:
        system: File system that opens the files.
        field: Configuration path of the source; errors name it.
        path: The folder, as configured.
        found: Paths of all files below the folder.

    Raises:
        CorpusError: The folder holds several splits, and none of them is `train`.
        OSError: A `state.json` cannot be read.
    """
    states = {
        each: named for each in found if _name(each) == "state.json" and (named := _named(system, each)) is not None
    }
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


def _ending(path: str) -> str:
    name = PurePosixPath(path)
    return (PurePosixPath(name.stem).suffix if name.suffix in COMPRESSED else name.suffix).lower()


def _named(system: Any, state: str) -> list[str] | None:
    """File names in a data set's `state.json`; None if another program wrote the file."""
    with system.open_input_stream(state) as stream:
        data = stream.read()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    entries = content.get("_data_files") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        return None
    names = [
        entry["filename"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("filename"), str)
    ]
    return names if len(names) == len(entries) else None


def _name(path: str) -> str:
    return PurePosixPath(path).name
