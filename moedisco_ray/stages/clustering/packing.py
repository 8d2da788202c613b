"""Pack the documents of one cluster. The module imports quickly, since it runs in separate tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.stages.clustering.build import overlap_documents, own_documents
from moedisco_ray.stages.text.packing import Keep, pack
from moedisco_ray.stages.text.tokenizer import Encoder


def pack_cluster(
    parts: Sequence[Path], assignments: Sequence[Path], cluster: int, directory: Path, tokenizer: Path,
) -> dict[str, Any]:
    """Pack the documents that a cluster trains on: its own, then the overlap from other clusters.

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
    keeps: list[Keep] = [lambda _, part: own_documents(assignments[part], cluster)]
    if any(overlap_documents(path, cluster).any() for path in assignments):
        keeps.append(lambda _, part: overlap_documents(assignments[part], cluster))
    return pack(parts, directory, eos=encoder.eos, vocab_size=encoder.vocab_size, keeps=keeps, bos=encoder.bos)
