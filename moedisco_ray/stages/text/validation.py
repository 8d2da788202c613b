"""Load the validation documents that models are evaluated on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moedisco_ray.core.errors import CorpusError

_COLUMNS = ["id", "source", "text", "tokens", "loss_mask"]


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents as columns of equal length.

    Attributes:
        ids: Id of each document, in ascending order.
        sources: Name of each document's source.
        tokens: Token ids of each document, without special tokens.
        loss_masks: Whether the loss counts each token of a document; None for a document whose tokens all count.
    """

    ids: tuple[bytes, ...]
    sources: tuple[str, ...]
    texts: tuple[str, ...]
    tokens: tuple[NDArray[np.int32], ...]
    loss_masks: tuple[NDArray[np.bool_] | None, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask_N: NDArray[np.bool_]) -> Documents:
        """Select the documents for which `mask_N` is true, in order."""
        kept = [int(i) for i in np.flatnonzero(mask_N)]
        return Documents(
            tuple(self.ids[i] for i in kept),
            tuple(self.sources[i] for i in kept),
            tuple(self.texts[i] for i in kept),
            tuple(self.tokens[i] for i in kept),
            tuple(self.loss_masks[i] for i in kept),
        )

    def digest(self) -> str:
        """SHA-256 of texts, token ids and masks: two models have comparable losses on documents of equal digests."""
        found = hashlib.sha256()
        for document, ids, mask in zip(self.ids, self.tokens, self.loss_masks, strict=True):
            for part in (document, ids.tobytes(), b"" if mask is None else np.packbits(mask).tobytes()):
                found.update(len(part).to_bytes(8, "little") + part)
        return found.hexdigest()


def load_documents(parts: Sequence[Path], max_tokens: int) -> Documents:
    """Read whole documents in ascending order of id until the next one would exceed `max_tokens`.

    An id is the hash of a text, so the first documents are a uniform sample, the same on every machine. If even the
    first document is longer, only its first `max_tokens` tokens are taken, with the same share of its text.

    Args:
        parts: Parquet files, sorted by id across files, with the columns id, source, text, tokens and loss_mask.
        max_tokens: Maximum tokens to load.

    Raises:
        CorpusError: The parts hold no document.
    """
    ids: list[bytes] = []
    sources: list[str] = []
    texts: list[str] = []
    tokens: list[NDArray[np.int32]] = []
    loss_masks: list[NDArray[np.bool_] | None] = []
    room = max_tokens
    for part in parts:
        for batch in pq.ParquetFile(part).iter_batches(batch_size=256, columns=_COLUMNS):
            columns = [batch.column(name) for name in _COLUMNS]
            for row in range(batch.num_rows):
                length = len(columns[3][row])
                if ids and length > room:
                    return Documents(tuple(ids), tuple(sources), tuple(texts), tuple(tokens), tuple(loss_masks))
                text = columns[2][row].as_py()
                ids.append(columns[0][row].as_py())
                sources.append(columns[1][row].as_py())
                texts.append(text if length <= room else _share(text, room, length))
                tokens.append(columns[3][row].values.to_numpy(zero_copy_only=False).astype(np.int32)[:room])
                mask = columns[4][row]
                loss_masks.append(mask.values.to_numpy(zero_copy_only=False)[:room] if mask.is_valid else None)
                room -= min(length, room)
    if not ids:
        raise CorpusError(
            "corpus.validation_fraction", None, "no document was held out for validation; raise it, or add documents"
        )
    return Documents(tuple(ids), tuple(sources), tuple(texts), tuple(tokens), tuple(loss_masks))


def _share(text: str, tokens: int, length: int) -> str:
    data = text.encode()
    return data[: len(data) * tokens // length].decode(errors="ignore")


def validation_parts(corpus: Path) -> tuple[Path, ...]:
    """Files of a corpus artifact's validation documents, in order."""
    return tuple(sorted((corpus / "validation").glob("*.parquet")))
