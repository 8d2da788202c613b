"""The text of a data owner: its own nodes make it a corpus in its own storage, and only figures leave.

STORAGE/NAME-ID/corpus/   documents, tokenizer and packed tokens, as in a run directory
                logs/     why a text could not be read, which may quote it; logs of trainers
                checkpoints/
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import CorpusError, RunError, UserError
from moedisco_ray.core.records.run_damage import damage_in_folder
from moedisco_ray.core.records.summaries import OwnedText
from moedisco_ray.core.store.artifacts import commit, parse_manifest, write_text
from moedisco_ray.core.store.locations import CORPUS, Location
from moedisco_ray.core.store.manifests import LOGS, MANIFEST
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.core.store.run_takeover import collect
from moedisco_ray.stages.corpus.build import Owned, build
from moedisco_ray.stages.corpus.shuffle import MapTasks, in_this_process


def build_owned(
    config: RunConfig,
    name: str,
    *,
    location: Location,
    tokenizer: Path,
    fingerprint: str,
    map_tasks: MapTasks = in_this_process,
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
        CorpusError: The text is missing, unreadable or too short. The reason is in the owner's storage, as it may quote
            the text.
        RunError: Anything else failed, for a reason that is in the owner's storage too; or the storage does not
            respond.
    """
    store = RunStore.of(location)
    made = parse_manifest(store.read(f"{CORPUS}/{MANIFEST}"), CORPUS, str(store.location))
    if made is None or made.fingerprint != fingerprint:
        failure: Exception | None = None
        try:
            with commit(store.directory / CORPUS, fingerprint, store, "corpus") as draft:
                draft.summary.update(build(config, draft.path, map_tasks, owned=Owned(name, store, tokenizer)))
                summary = draft.summary
        except RunError:  # such as a storage that does not respond, in this package's own words
            raise
        except Exception as error:  # noqa: BLE001 - the libraries that read text may raise anything, and quote it
            failure = error
        if failure is not None:  # not in the handler, where an error of the storage would carry this one along
            raise _explained(failure, store, name)
        collect(store)
    else:
        summary = made.summary
    return OwnedText.model_validate({key: summary[key] for key in OwnedText.model_fields}).to_json()


def repair_owned(*, location: Location, map_tasks: MapTasks = in_this_process) -> list[str]:
    """Verify the corpus of a data owner, on one of its nodes.

    If it is damaged, `build_owned` makes it again from then on.

    Args:
        location: The run's folder in the owner's storage.
        map_tasks: Not used: one node verifies all files.

    Returns:
        Names of the damaged files; of a corpus that does not exist, its manifest.
    """
    del map_tasks
    store = RunStore.of(location, verifies=False)
    damaged = damage_in_folder(store, CORPUS)
    if damaged:
        store.delete(f"{CORPUS}/{MANIFEST}")
    return [MANIFEST] if damaged is None else damaged


def _explained(failure: Exception, store: RunStore, name: str) -> CorpusError | RunError:
    """Log an owner's failure in its storage, and return the error to raise instead, without words of the text."""
    log = store.directory / LOGS / "corpus.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    write_text(log, f"{failure}\n" if isinstance(failure, UserError) else "".join(traceback.format_exception(failure)))
    store.publish(log)
    field, words = (
        f"pools.owners.{name}",
        f"its text could not be made into a corpus; {store.location}/{LOGS}/corpus.log says why",
    )
    # A `UserError` is a ValueError, and so are the errors of parsers.
    return CorpusError(field, None, words) if isinstance(failure, ValueError) else RunError(f"{field}: {words}")
