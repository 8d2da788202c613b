"""Score how well a model predicts documents: perplexity and bits per byte.

A document's first token is predicted from the token that precedes it in training: BOS if the tokenizer adds it, else
the EOS of the previous document. Documents are divided into windows of the training sequence length that do not
overlap. A window's first token is predicted from the token before the window.

Axes: B windows of a batch, L positions of its longest window, D hidden, T real (not padding) positions of a batch,
C positions of a chunk, W windows, N documents.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from moedisco_ray.core.cards import BF16_CAPABILITY
from moedisco_ray.core.errors import RunError
from moedisco_ray.core.limits import BATCH_TOKENS, MOST_LOGITS
from moedisco_ray.core.records.events import Advance, no_advance
from moedisco_ray.models import head_inputs
from moedisco_ray.models.layer_stream import final_states, grouped
from moedisco_ray.models.streamed import device_of_model, loaded
from moedisco_ray.stages.text.validation import Documents

_PADDING = -100

Observe = Callable[[Tensor, Tensor], None]
"""Function that is called before layers run on a batch, with `real_BL` (false at padding) and `document_B` (one per
window)."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-likelihood of some documents under a model. Scores of disjoint sets of documents add up.

    Attributes:
        nats: Negative log-likelihood of all tokens.
        tokens: Tokens that were predicted and count: of conversations, those of the assistant.
        bytes: UTF-8 bytes of the texts; of a conversation, the share of its counted tokens.
    """

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    documents: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.documents + other.documents,
        )

    @property
    def loss(self) -> float | None:
        """Nats per token; None without tokens."""
        return self.nats / self.tokens if self.tokens else None

    @property
    def perplexity(self) -> float | None:
        """exp(nats per token); None without tokens."""
        return math.exp(min(self.nats / self.tokens, 700.0)) if self.tokens else None

    @property
    def bits_per_byte(self) -> float | None:
        """Nats / ln 2 / UTF-8 bytes: comparable between tokenizers; None without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return {
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
        }


def perplexity(
    model: PreTrainedModel,
    documents: Documents,
    *,
    prefix: int,
    sequence_length: int,
    batch_tokens: int = BATCH_TOKENS,
    advance: Advance = no_advance,
) -> Score:
    """Score a model on documents; see `document_nats`."""
    nats_N = document_nats(
        model,
        documents.tokens,
        prefix=prefix,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        advance=advance,
        loss_masks=documents.loss_masks,
    )
    return sum(document_scores(documents, nats_N), Score())


def document_scores(documents: Documents, nats_N: NDArray[np.float64]) -> list[Score]:
    """One score per document."""
    scores = []
    for nats, tokens, text, mask in zip(nats_N, documents.tokens, documents.texts, documents.loss_masks, strict=True):
        counted = len(tokens) if mask is None else int(mask.sum())
        size = len(text.encode())
        scores.append(Score(float(nats), counted, size if mask is None else round(size * counted / len(tokens)), 1))
    return scores


def document_nats(
    model: PreTrainedModel,
    tokens: Sequence[NDArray[np.int32]],
    *,
    prefix: int,
    sequence_length: int,
    batch_tokens: int = BATCH_TOKENS,
    observe: Observe | None = None,
    advance: Advance = no_advance,
    loss_masks: Sequence[NDArray[np.bool_] | None] | None = None,
) -> NDArray[np.float64]:
    """Negative log-likelihood of each document, in nats, summed in float64.

    Windows of similar length run together, padded on the right, so that no real position sees the padding. The result
    depends on the size of a batch only through the rounding of the model's own arithmetic.

    Args:
        model: The model, on its device; its training or evaluation mode is restored afterwards.
        tokens: Tokens of each document, without BOS and EOS.
        prefix: The token before each document.
        sequence_length: Maximum positions of a window.
        batch_tokens: Maximum positions of a batch, padding included, unless one window is longer.
        observe: Called before layers run on a batch; several times if the model's layers are loaded one at a time.
        advance: Receives the number of tokens of each batch, in parts if layers are loaded one at a time.
        loss_masks: Whether each token of a document counts; None counts all.

    Returns:
        Nats [N], float64.

    Raises:
        RunError: The model's likelihood is not finite.
    """
    nats_NT = token_nats(
        model,
        tokens,
        prefix=prefix,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        observe=observe,
        advance=advance,
    )
    return counted_nats(nats_NT, loss_masks or [None] * len(tokens))


def counted_nats(
    nats_NT: Sequence[NDArray[np.float64]], loss_masks: Sequence[NDArray[np.bool_] | None]
) -> NDArray[np.float64]:
    """Nats of each document [N], summed over the tokens that the loss counts; see `Documents.loss_masks`."""
    return np.array(
        [nats_T.sum() if mask is None else nats_T[mask].sum() for nats_T, mask in zip(nats_NT, loss_masks, strict=True)]
    )


def token_nats(
    model: PreTrainedModel,
    tokens: Sequence[NDArray[np.int32]],
    *,
    prefix: int,
    sequence_length: int,
    batch_tokens: int = BATCH_TOKENS,
    observe: Observe | None = None,
    advance: Advance = no_advance,
) -> list[NDArray[np.float64]]:
    """Negative log-likelihood of each token of each document, in nats; see `document_nats`."""
    predicted = predict_tokens(
        model,
        tokens,
        prefix=prefix,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        observe=observe,
        advance=advance,
    )
    return [nats_T for nats_T, _ in predicted]


def predict_tokens(
    model: PreTrainedModel,
    tokens: Sequence[NDArray[np.int32]],
    *,
    prefix: int,
    sequence_length: int,
    batch_tokens: int = BATCH_TOKENS,
    observe: Observe | None = None,
    advance: Advance = no_advance,
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Negative log-likelihood of each token (nats), and whether it was the likeliest one; see `document_nats`."""
    nats_NT = [np.zeros(len(document)) for document in tokens]
    likeliest_NT = [np.zeros(len(document), dtype=np.bool_) for document in tokens]
    lengths_N = np.array([len(document) for document in tokens], dtype=np.int64)
    batches = plan_batches(lengths_N, sequence_length, batch_tokens)
    with _evaluating(model), torch.inference_mode():
        for group in grouped(batches, lambda windows: len(windows) * int(windows[0, 2]), model):
            filled = [fill(tokens, windows, prefix) for windows in group]
            predicted = _predict_group(model, group, filled, observe, advance)
            for windows, (nats_BL, likeliest_BL) in zip(group, predicted, strict=True):
                scored = zip(windows, nats_BL.cpu().numpy(), likeliest_BL.cpu().numpy(), strict=True)
                for (document, start, length), nats_L, likeliest_L in scored:
                    nats_NT[document][start : start + length] = nats_L[:length]
                    likeliest_NT[document][start : start + length] = likeliest_L[:length]
    for number, nats_T in enumerate(nats_NT):
        if not np.isfinite(nats_T).all():
            raise RunError(
                f"the model's likelihood of validation document {number} is not finite: its weights are broken"
            )
    return list(zip(nats_NT, likeliest_NT, strict=True))


def _predict_group(
    model: PreTrainedModel,
    group: Sequence[NDArray[np.int64]],
    filled: Sequence[tuple[Tensor, Tensor]],
    observe: Observe | None,
    advance: Advance,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for every batch of a group, each token's nats and whether it was the likeliest token, [B, L] each."""
    device, layers = device_of_model(model), int(model.config.num_hidden_layers)
    targets = [targets_BL.to(device) for _, targets_BL in filled]
    passed = [0] * len(group)

    def before(number: int) -> None:
        if observe is not None:
            observe(targets[number] != _PADDING, torch.from_numpy(group[number][:, 0]).to(device))

    def after(number: int, count: int) -> None:
        real, done = int(group[number][:, 2].sum()), passed[number]
        passed[number] += count
        advance(real * (done + count) // layers - real * done // layers)

    states = final_states(model, (inputs_BL.to(device) for inputs_BL, _ in filled), before=before, after=after)
    # all layers run before the head is loaded, unless all weights stay loaded
    states = itertools.chain([next(states)], states)
    with loaded(model.get_output_embeddings()) as head:
        for hidden_BLD, targets_BL in zip(states, targets, strict=True):
            yield _predict_windows(head, head_inputs(model, hidden_BLD), targets_BL)


def plan_batches(lengths_N: NDArray[np.int64], sequence_length: int, batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Cut documents into windows and batch windows of similar length, longest first.

    Yields:
        Each batch as an array [B, 3]; a row is a window's document number, start and length.
    """
    counts_N = -(-lengths_N // sequence_length)
    document_W = np.repeat(np.arange(len(lengths_N)), counts_N)
    start_W = (np.arange(len(document_W)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)) * sequence_length
    length_W = np.minimum(lengths_N[document_W] - start_W, sequence_length)
    windows_W3 = np.stack([document_W, start_W, length_W], axis=1)[np.argsort(-length_W, kind="stable")]
    done = 0
    while done < len(windows_W3):
        size = max(1, batch_tokens // int(windows_W3[done, 2]))
        yield windows_W3[done : done + size]
        done += size


def default_dtype(device: str) -> torch.dtype:
    """Dtype in which a model is measured: bf16 on a GPU that has it, fp32 elsewhere."""
    bf16 = device.startswith("cuda") and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY
    return torch.bfloat16 if bf16 else torch.float32


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def fill(
    tokens: Sequence[NDArray[np.int32]],
    windows: NDArray[np.int64],
    prefix: int,
    loss_masks: Sequence[NDArray[np.bool_] | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, L] of a batch from `plan_batches`, padded on the right.

    The target is -100 at padding, and at tokens that the loss does not count if `loss_masks` is given.
    """
    shape = (len(windows), int(windows[:, 2].max()))
    inputs_BL = np.full(shape, prefix, dtype=np.int64)
    targets_BL = np.full(shape, _PADDING, dtype=np.int64)
    for row, (document, start, length) in enumerate(windows):
        span = tokens[document][start : start + length]
        mask = None if loss_masks is None else loss_masks[document]
        targets_BL[row, :length] = span if mask is None else np.where(mask[start : start + length], span, _PADDING)
        inputs_BL[row, 1:length] = span[:-1]
        if start:
            inputs_BL[row, 0] = tokens[document][start - 1]
    return torch.from_numpy(inputs_BL), torch.from_numpy(targets_BL)


def _predict_windows(head: nn.Module, hidden_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    # The head runs on real positions only, in chunks: the logits of a large vocabulary can be larger than the model.
    real_BL = targets_BL != _PADDING
    hidden_TD, targets_T = hidden_BLD[real_BL], targets_BL[real_BL]
    weight_VD: Any = head.weight
    size = max(1, MOST_LOGITS // len(weight_VD))
    nats_BL = torch.zeros(real_BL.shape, dtype=torch.float64, device=real_BL.device)
    likeliest_BL = torch.zeros_like(real_BL)
    pieces = [
        _predict(head(hidden_CD).float(), targets_C)
        for hidden_CD, targets_C in zip(torch.split(hidden_TD, size), torch.split(targets_T, size), strict=True)
    ]
    nats_BL[real_BL] = torch.cat([nats_C for nats_C, _ in pieces]).double()
    likeliest_BL[real_BL] = torch.cat([likeliest_C for _, likeliest_C in pieces])
    return nats_BL, likeliest_BL


def _predict(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(logits_CV, targets_C, reduction="none"), logits_CV.argmax(dim=-1) == targets_C
