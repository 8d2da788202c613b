"""Cost of the corpus: CPUs tokenize the sources, which costs nothing.

The time is unknown if the size of the sources is unknown. Stored are the text (4 bytes per token), token ids (4) and
packed tokens (2, or 4 if the vocabulary has more than 65,536 entries).
"""

from __future__ import annotations

from moedisco_ray.core.limits import TEXT_BYTES_PER_TOKEN
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.host_memory import ID_BYTES, corpus_memory
from moedisco_ray.plan.reading import Reading, StageEstimate
from moedisco_ray.plan.stage_cost import StageCost


def _estimate(reading: Reading) -> StageEstimate:
    probe, size = reading.machine.probe, reading.machine.text_bytes
    seconds = None if probe is None or size is None else probe.start_up_seconds + size / probe.text_bytes_per_second
    return reading.on_head("corpus", seconds)


def _storage(files: Files) -> StageStorage:
    text = TEXT_BYTES_PER_TOKEN * files.corpus_tokens
    stored = text + (ID_BYTES + files.token_bytes) * files.corpus_tokens
    # The text is moved four times: read, written and read again by the shuffle, and written with its tokens.
    return StageStorage(
        stage="corpus",
        pool="cpu",
        stored=stored,
        node_disk=text + stored,
        worker_memory=corpus_memory(text),
        moved=3 * text + stored,
    )


COST = StageCost(_estimate, _storage)
