"""Committed directories: their manifests, and uploads and downloads of their files for runs at a URI."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedisco_ray.core.errors import StorageError
from moedisco_ray.core.store.checksums import Entries, Entry, is_intact

if TYPE_CHECKING:
    from moedisco_ray.core.store.remote import Remote

MANIFEST = "manifest.json"
FILES = "files"
"""Key of a manifest with the entry of each file."""
LEASE = "lease.json"
CHECKPOINTS, LOGS, OBJECTS, RECEIPTS, STEPS = "checkpoints", "logs", "objects", "receipts", "steps"
TRAINED, RESULT = "trained", "result.json"
"""Folder of a training's output, and file with its result, in the training's folder below `checkpoints`."""
ADAPTER_FOLDER = "adapter"
"""Folder of the adapters in the directory of a trained model, for `peft.PeftModel.from_pretrained` on the untrained
one."""
SYNC, MEMBERS, ROSTER, SYNCED = "sync", "members", "roster.json", "sync.json"
"""Folder of a stage's sync points, next to its trainings; in each of them, folder of what members write, the record
there of who is combined, and the last file."""
COMBINED = ("common", "momentum")
"""Folders of a sync point with what the members have combined: weights, and the momentum of the outer step."""
CODED = ("update", "residual")
"""Further ones where changes of weights are exchanged in 4 bits: codes of the common update, and what they lose."""
KEPT_SYNCS = 2
"""Number of sync points whose weights are kept. The latest is not enough, because a late member may still read the one
before."""
DRAFTS = ".drafts"
"""Folder at a URI of Azure for objects that are being written; see `remote`."""

_TRANSFERS = 8
"""Number of parallel transfers in one call: at 100 MB/s per stream, as from S3, 8 streams use most of a 10 Gbit/s
connection."""


def upload(remote: Remote, files: Iterable[Path], root: Path, prefix: str) -> Entries:
    """Upload files as objects, and return an entry for each.

    Args:
        remote: Folder of the run at its URI.
        files: Files below `root`.
        root: Directory relative to which the entries are named.
        prefix: Folder of the objects, relative to `remote`.
    """

    def one(path: Path) -> tuple[str, Entry]:
        name = path.relative_to(root).as_posix()
        return name, Entry(*remote.upload(path, f"{prefix}/{name}"), f"{prefix}/{name}")

    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="upload") as threads:
        return dict(threads.map(one, files))


def download(remote: Remote, wanted: Mapping[Path, Entry]) -> None:
    """Download files, and check the size and SHA-256 of each."""

    def one(item: tuple[Path, Entry]) -> None:
        path, entry = item
        remote.download(entry.object, path, entry.size, entry.sha256)

    with ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="download") as threads:
        list(threads.map(one, wanted.items()))


def owner_of(name: str) -> str | None:
    """Name of the committed directory that contains a file, judged by its name; None for other files and for drafts."""
    top, _, rest = name.partition("/")
    if top in (OBJECTS, RECEIPTS, LOGS) or (not rest and "." in top):
        return None
    return name if top == CHECKPOINTS else top


def cached_unit(name: str) -> str:
    """The unit (see `cache`) to which a file belongs: the cache keeps or deletes a unit as a whole."""
    return attempt_of(name) if name.startswith(f"{OBJECTS}/") else owner_of(name) or name


def attempt_of(name: str) -> str:
    """Folder of the attempt that wrote an object: `objects/ATTEMPT`."""
    return "/".join(name.split("/")[:2])


def entries_of(document: bytes | Mapping[str, Any]) -> Entries:
    """The file entries of a manifest or of a receipt (a list of one worker's uploads), from its JSON or its values."""
    values = document if isinstance(document, Mapping) else json.loads(document)
    return {name: Entry(*entry) for name, entry in values.get(FILES, {}).items()}


def committed_entries(remote: Remote, owner: str) -> Entries | None:
    """Entries of the files of a committed directory at a URI; None if the directory is not committed."""
    content = remote.read(f"{owner}/{MANIFEST}")
    return None if content is None else entries_of(content)


def check_entries(directory: Path, wanted: Mapping[Path, Entry]) -> None:
    """Refuse a manifest with files outside its directory or objects outside its run, since other drivers write some.

    Raises:
        StorageError: An entry is outside.
    """
    for path, entry in wanted.items():
        inside = path.is_relative_to(directory) and entry.object.startswith(f"{OBJECTS}/")
        if not inside or ".." in (*path.parts, *entry.object.split("/")):
            raise StorageError(f"the manifest of {directory.name} lists a file outside of itself; name another run")


def gather(remote: Remote, attempt: str, draft: Path) -> Entries:
    """Entries of all files of a draft, uploaded by any machine. Uploads the files that only this machine has.

    Args:
        remote: Folder of the run at its URI.
        attempt: Folder of the draft's objects.
        draft: The draft on this machine.
    """
    entries: Entries = {}
    receipts = attempt.replace(OBJECTS, RECEIPTS, 1)
    for name in sorted(remote.list(receipts)):
        entries |= entries_of(remote.read(name) or b"{}")
    entries |= upload(
        remote, [path for path in files_in(draft) if not is_uploaded(path, draft, entries)], draft, attempt
    )
    stored = remote.list(attempt)
    own = {name for name, entry in entries.items() if entry.object.startswith(f"{attempt}/")}
    removed = {name for name in own if entries[name].object not in stored}
    for name in own - removed:
        if stored[entries[name].object] != entries[name].size:
            raise StorageError(f"{entries[name].object} in {remote.location} has another size than its writer reported")
    return {name: entry for name, entry in sorted(entries.items()) if name not in removed}


def write_receipt(remote: Remote, draft: str, entries: Entries) -> None:
    """Store the entries of files of a draft that one worker has uploaded."""
    # Names sort by time: if two receipts list the same file, the newer one is valid.
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    remote.write(f"{draft.replace(OBJECTS, RECEIPTS, 1)}/{name}", as_json({FILES: entries}))


def as_json(value: Any) -> bytes:
    """A value as JSON bytes, to be stored as an object."""
    return (json.dumps(value, indent=1) + "\n").encode()


def files_in(path: Path) -> list[Path]:
    """All files below a directory, sorted; for the path of a file, only this file."""
    return sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def is_uploaded(path: Path, draft: Path, entries: Entries) -> bool:
    """Whether the current content of a draft's file is already uploaded, according to `entries`."""
    entry = entries.get(path.relative_to(draft).as_posix())
    return entry is not None and is_intact(path, entry)
