"""A run with text of two data owners, and a search for their text in every file, byte by byte."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pinned_runs import LENGTH, SIZES, write_text

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.stages.text.tokenizer import Encoder

OWNERS = {"alice": 1, "bob": 2}
"""Domain of each owner's text; domain 0 has no owner."""
RUN_TOKENS = 16
"""Length of the token sequences that are searched for."""


def owned_config(
    home: Path, output: Path | str | None = None, storages: Mapping[str, str] | None = None, **changes: Any
) -> RunConfig:
    """Four clusters, two of them the owners'; sections in `changes` replace single settings."""
    text = home / "text"
    if not text.exists():
        write_text(text)
    places = storages or {name: str(home / name) for name in OWNERS}
    base: dict[str, Any] = {
        "name": "owned",
        "output": str(output or home / "runs"),
        "corpus": {
            "sequence_length": LENGTH,
            "sources": [
                {"path": str(text / "domain0.jsonl"), "name": "public"},
                *({"path": str(text / f"domain{domain}.jsonl"), "owner": name} for name, domain in OWNERS.items()),
            ],
        },
        "tokenizer": {"train_vocab_size": 400},
        "model": {"config": SIZES},
        "tokens": {"total": 60_000, "seed_share": 0.3, "finetune_share": 0.2},
        "submodels": {"optimizer": {"batch_tokens": 512}, "sync_every": 10},
        "finetune": {"optimizer": {"batch_tokens": 512}, "keep_optimizer_state": False},
        "merge": {"calibration_tokens": 4096},
        "checkpoint": {"every": 5},
        "evaluation": {"max_tokens": 5000, "every_tokens": 4096},
        "pools": {"owners": {name: {"storage": places[name], "resource": f"{name}_gpu"} for name in OWNERS}},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return check_config(base)


def texts_of(config: RunConfig, owner: str | None) -> list[str]:
    """The documents of an owner."""
    paths = [source.path for source in config.corpus.of_owner(owner).values()]
    return [json.loads(line)["text"] for path in paths for line in Path(path).read_text().splitlines()]


def traces(texts: Sequence[str], encoder: Encoder) -> Iterator[tuple[bytes, ...]]:
    """Per document, what shows that a file holds it: pieces of its text, and of its tokens as integers."""
    for text, ids in zip(texts, encoder.encode(texts), strict=True):
        starts = (0, max(0, (len(ids) - RUN_TOKENS) // 2))
        tokens = [ids[start : start + RUN_TOKENS].astype(kind).tobytes() for start in starts for kind in ("<u2", "<u4")]
        yield text[:40].encode(), text[-40:].encode(), *tokens


def found(traces: Iterable[tuple[bytes, ...]], places: Iterable[Path]) -> list[tuple[bool, bool]]:
    """Whether any file below the places, or in its compressed parts, holds text or tokens of each document."""
    whole = b"\0\0".join(content for place in places for path in _files(place) for content in _contents(path))

    def holds(pieces: Iterable[bytes]) -> bool:
        return any(piece in whole for piece in pieces)

    return [(holds(pieces[:2]), holds(pieces[2:])) for pieces in traces]


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())


def _contents(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    yield data
    if data[:4] == b"PAR1":
        for column in pq.read_table(io.BytesIO(data)).columns:
            if pa.types.is_string(column.type):
                yield "\0".join(column.to_pylist()).encode()
            elif pa.types.is_list(column.type):
                yield from (
                    np.asarray(value, dtype="<u4").tobytes() for value in column.to_pylist() if value is not None
                )
    elif data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from map(archive.read, archive.namelist())
