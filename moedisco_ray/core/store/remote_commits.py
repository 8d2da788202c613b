"""Commit directories of a run at a URI: upload their files as objects, then write the manifest that lists them."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moedisco_ray.core.store.artifacts import replace_directory, write_text
from moedisco_ray.core.store.cache import record
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.core.store.manifests import (
    FILES,
    MANIFEST,
    OBJECTS,
    RECEIPTS,
    as_json,
    committed_entries,
    files_in,
    gather,
    owner_of,
    upload,
    write_receipt,
)

if TYPE_CHECKING:
    from moedisco_ray.core.store.remote import Remote


@dataclasses.dataclass(frozen=True)
class RemoteCommits:
    """Commits of a run at a URI. Paths in the run are given by their names relative to the run directory.

    Attributes:
        remote: Folder of the run at its URI.
        directory: The run directory on this machine, which is the working copy.
    """

    remote: Remote
    directory: Path

    def commit(self, name: str, path: Path) -> None:
        """Upload the files of a finished directory, and commit it under a name."""
        attempt = f"{OBJECTS}/{path.name}-{uuid.uuid4().hex[:12]}"
        content = as_json(with_checksum({FILES: upload(self.remote, files_in(path), path, attempt)}))
        self.remote.write(f"{name}/{MANIFEST}", content)
        record(self.directory.parent, name, content)

    def replace(self, draft: str, name: str, manifest: Mapping[str, Any], check: Callable[[], None]) -> None:
        """Replace a directory with its complete draft; see `RunStore.replace`."""
        drafted = self.directory / draft
        content = as_json(with_checksum({**manifest, FILES: gather(self.remote, draft, drafted)}))
        check()
        self.remote.write(f"{name}/{MANIFEST}", content)
        write_text(drafted / MANIFEST, content.decode())
        replace_directory(drafted, self.directory / name)
        record(self.directory.parent, name, content)
        self.remote.delete_folder(draft.replace(OBJECTS, RECEIPTS, 1))

    def amend(self, name: str) -> None:
        """Replace a file of a committed artifact with the changed file in the working copy."""
        owner = name.partition("/")[0]
        directory = self.directory / owner
        manifest = json.loads(self.remote.read(f"{owner}/{MANIFEST}") or b"{}")
        attempt = f"{OBJECTS}/{owner}-{uuid.uuid4().hex[:12]}"
        manifest[FILES] |= upload(self.remote, [self.directory / name], directory, attempt)
        content = as_json(with_checksum(manifest))
        self.remote.write(f"{owner}/{MANIFEST}", content)
        write_text(directory / MANIFEST, content.decode())
        record(self.directory.parent, owner, content)

    def link(self, source: str, target: str) -> None:
        """Add the files of a finished directory to a draft, as references to their objects."""
        owner = owner_of(source) or source
        below = f"{source}/"[len(owner) + 1 :]
        draft, _, inside = target[len(OBJECTS) + 1 :].partition("/")
        entries = {
            f"{inside}/{name[len(below) :]}".lstrip("/"): entry
            for name, entry in (committed_entries(self.remote, owner) or {}).items()
            if name.startswith(below)
        }
        write_receipt(self.remote, f"{OBJECTS}/{draft}", entries)
