"""Packing a cluster's documents, where corpus and clusters meet. Light to import: it runs in tasks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.stages.clustering.build import given, owned
from moedisco_ray.stages.text.packing import Keep, pack
from moedisco_ray.stages.text.tokenizer import Encoder


def pack_cluster(
    parts: Sequence[Path], assignments: Sequence[Path], cluster: int, directory: Path, tokenizer: Path,
) -> dict[str, Any]:
    """Pack the documents that a cluster trains on: its own, then what it was given of others.

    Args:
        parts: The corpus' documents.
        assignments: Their clusters, a file per part.
        cluster: Whose documents.
        directory: Where the packed tokens go.
        tokenizer: The corpus' tokeniser.

    Returns:
        The index of the packed tokens.
    """
    encoder = Encoder(tokenizer)
    keeps: list[Keep] = [lambda _, part: owned(assignments[part], cluster)]
    if any(given(path, cluster).any() for path in assignments):
        keeps.append(lambda _, part: given(assignments[part], cluster))
    return pack(parts, directory, encoder.eos, encoder.vocab_size, keeps, encoder.bos)
