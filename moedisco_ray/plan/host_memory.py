"""Host memory of the stages that handle text or cut the model, without the process itself: upper bounds.

* corpus: a task brings together documents of at most 128 MiB, which takes three times as much; or it holds one range of
  ids: its text, the sorted copy, token ids and packed tokens, of at most 32 MiB of text in a corpus of up to 128 GB.
  Measured for ranges of 16 MB, with nothing left in Arrow's pool before: 240 to 242 MiB, of 251 MiB planned.
* cluster: the driver holds the sample's texts twice, once as Python strings, with token ids; the vectors on which
  k-means is fitted, in six copies at most; and the costs on which prices are fitted, in five copies of 8 bytes. Tf-idf
  adds the words of the sample and the components, and vectors of mean tokens the embedding. A task holds one part of
  the corpus.
* decompose: all tensors of a weight file, of the backbone or of the experts of one sub-model, and the largest tensor
  while it is made, in fp32 and in a copy.

Documents are assumed to have as many tokens as a sequence.

Letters: D dimensions of a vector, C clusters.
"""

from __future__ import annotations

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.limits import (
    BALANCE_DOCUMENTS,
    CENTROID_DOCUMENTS,
    HELD_BYTES,
    MOST_TERMS,
    RANGE_BYTES,
    SAMPLED_DOCUMENTS,
    SHARD_BYTES,
    TERM_DIMENSIONS,
    TEXT_BYTES_PER_TOKEN,
)
from moedisco_ray.plan.parameters import Parameters

ID_BYTES = 4
"""Size of a token id in the corpus (bytes)."""
_TASK_BYTES = 144 * 2**20
"""Memory of a text task besides its documents: Python strings of a chunk, tokenizer, buffers of Arrow (bytes)."""
_TASK_COPIES = 7
"""Memory of the documents in a range of ids, as a multiple of their text."""
_SHUFFLED_COPIES = 3
_VECTOR_COPIES = 6
_COST_COPIES = 5
_TERM_BYTES = 24
"""Memory of one word of a document in sparse matrices of tf-idf, which exist twice (bytes)."""


def corpus_memory(text_bytes: int) -> int:
    """Memory of one task of the corpus stage.

    Args:
        text_bytes: Size of the corpus (bytes).
    """
    return _TASK_BYTES + max(
        _TASK_COPIES * min(text_bytes, RANGE_BYTES), _SHUFFLED_COPIES * min(text_bytes, HELD_BYTES)
    )


def cluster_memory(config: RunConfig, corpus_tokens: int, vocab_size: int) -> int:
    """Memory of the driver and of one task while documents are clustered, without the model that gives the vectors.

    Args:
        config: The run's configuration.
        corpus_tokens: Tokens of the corpus.
        vocab_size: Entries of the vocabulary.
    """
    settings, length = config.clusters, config.corpus.sequence_length
    documents = -(-corpus_tokens // length)
    sample = min(documents, max(SAMPLED_DOCUMENTS, settings.number))
    held = sample * length * (2 * TEXT_BYTES_PER_TOKEN + ID_BYTES)
    held += _COST_COPIES * 8 * settings.number * min(documents, BALANCE_DOCUMENTS)
    if settings.vectors != "random":
        hidden = config.model.architecture.hidden_size
        dimensions = TERM_DIMENSIONS if settings.vectors == "tfidf_svd" else hidden
        fitted = min(documents, max(SAMPLED_DOCUMENTS, CENTROID_DOCUMENTS * settings.number))
        held += _VECTOR_COPIES * 4 * dimensions * fitted
        if settings.vectors == "tfidf_svd":
            held += _TERM_BYTES * length * sample + 4 * MOST_TERMS * dimensions
        elif settings.vectors == "mean_token":
            held += 4 * vocab_size * hidden
    return held + corpus_memory(corpus_tokens * TEXT_BYTES_PER_TOKEN)


def decompose_memory(part: Parameters) -> int:
    """Memory of the process that writes the untrained sub-models: random ones are in fp32, others need less.

    Args:
        part: Parameters of one sub-model.
    """
    experts = part.experts + part.router
    return min(SHARD_BYTES, 4 * max(experts, part.total - experts)) + 8 * part.largest_tensor
