"""The text of a data owner: its own nodes make it a corpus in its own storage, and only figures leave.

STORAGE/NAME-ID/corpus/   documents, tokenizer and packed tokens, as in a run directory
                logs/     why a text could not be read, which may quote it; logs of trainers
                checkpoints/
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moedisco_ray.core.artifacts import commit, parse_manifest, write_text
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.locations import CORPUS, Location
from moedisco_ray.core.manifests import LOGS, MANIFEST
from moedisco_ray.core.records import OwnedText
from moedisco_ray.core.run_store import RunStore
from moedisco_ray.core.run_takeover import collect
from moedisco_ray.stages.corpus.build import Owned, build
from moedisco_ray.stages.corpus.shuffle import MapTasks, in_this_process


def build_owned(
    config: RunConfig, name: str, *, location: Location, tokenizer: Path, fingerprint: str, map_tasks: MapTasks = in_this_process,
) -> dict[str, Any]:
    """Make the corpus of a data owner, on one of its nodes, unless it exists.

    Args:
        config: The run's configuration.
        name: The owner.
        location: The run's folder in the owner's storage.
        tokenizer: Directory of the run's tokenizer.
        fingerprint: Fingerprint of the corpus stage.
        map_tasks: Function that runs the tasks, on the owner's nodes.

    Returns:
        The fields of `OwnedText`.

    Raises:
        CorpusError: The text is missing, unreadable or too short. The reason is in the owner's storage, as it may quote the text.
    """
    store = RunStore.of(location)
    made = parse_manifest(store.read(f"{CORPUS}/{MANIFEST}") or b"")
    if made is None or made.fingerprint != fingerprint:
        try:
            with commit(store.directory / CORPUS, fingerprint, store) as draft:
                draft.summary.update(build(config, draft.path, map_tasks, owned=Owned(name, store, tokenizer)))
                summary = draft.summary
        except ValueError as error:     # `UserError` is one, and so are the errors of parsers
            log = store.directory / LOGS / "corpus.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            write_text(log, f"{error}\n")
            store.publish(log)
            raise CorpusError(
                f"pools.owners.{name}", None, f"its text could not be made into a corpus; {location}/{LOGS}/corpus.log says why",
            ) from None
        collect(store)
    else:
        summary = made.summary
    return OwnedText.model_validate({key: summary[key] for key in OwnedText.model_fields}).to_json()
