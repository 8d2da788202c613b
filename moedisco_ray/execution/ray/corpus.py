"""The corpus stage on Ray Data."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.events import Emit, discard
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.ray.event_mailbox import RunMailbox, open_mailbox
from moedisco_ray.execution.ray.tables import RayEngine
from moedisco_ray.stages.corpus import build, counting


def build_corpus(
    config: RunConfig,
    directory: Path,
    blocks: int | None = None,
    emit: Emit = discard,
    mailbox: RunMailbox | None = None,
) -> dict[str, Any]:
    """Build the corpus artifact on the connected Ray cluster.

    Args:
        config: The run's configuration.
        directory: An empty directory below the run directory, for the artifact.
        blocks: Number of tasks that read; by default, one per unit. The number does not change the result.
        emit: Receives `stage_progress` events.
        mailbox: The run's mailbox; None to start one.

    Returns:
        The stage's figures, as `corpus.build` returns them.

    Raises:
        UserError: As raised by `corpus.build`.
    """
    engine = RayEngine(f"{config.name}-corpus", RunStore.of(config.location), blocks)
    with open_mailbox(counting(emit), mailbox, uuid.uuid4().hex) as opened:
        return build(config, directory.absolute(), engine, events=opened.emitter)
