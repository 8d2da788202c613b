"""Pack the documents of one cluster. The module imports quickly, since it runs in separate tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.stages.clustering.build import own_documents
from moedisco_ray.stages.text.packing import pack
from moedisco_ray.stages.text.tokenizer import Encoder


def pack_cluster(
    parts: Sequence[Path], assignments: Sequence[Path], cluster: int, directory: Path, tokenizer: Path,
) -> dict[str, Any]:
    """Pack the documents of a cluster.

    Args:
        parts: Files of the corpus' documents.
        assignments: File of assignments for each part.
        cluster: Number of the cluster.
        directory: Directory of the packed tokens.
        tokenizer: Directory of the corpus' tokenizer.

    Returns:
        The index of the packed tokens.
    """
    encoder = Encoder(tokenizer)
    return pack(
        parts, directory, eos=encoder.eos, vocab_size=encoder.vocab_size, bos=encoder.bos,
        keep=lambda _, part: own_documents(assignments[part], cluster))
