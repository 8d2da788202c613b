"""Generate sample texts: the finished model continues prompts.

Shapes: V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from moedisco_ray.models.streamed import device_of_model

_TEMPERATURE = 0.7
_TOP_K = 40


NextLogits = Callable[[list[int], int], Tensor]
"""Function that takes all token ids of a text so far and how many of them are new since it was last called, and returns
the logits [V] of the next token."""


def reading(model: PreTrainedModel) -> NextLogits:
    """Let a model read a text from its beginning; it keeps a cache of the text between calls."""
    cache = DynamicCache(config=model.config)  # updated in place by the model

    def read(ids: list[int], new: int) -> Tensor:
        inputs = torch.tensor([ids[-new:]], device=device_of_model(model))
        # Pass the cache by position: supported versions of transformers name this argument differently.
        logits_V: Tensor = model(inputs, None, None, cache, use_cache=True).logits[0, -1]
        return logits_V

    return read


def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    seed: int,
    *,
    prefix: int | None = None,
    ends: Collection[int] = (),
    begin: Callable[[PreTrainedModel], NextLogits] = reading,
) -> list[dict[str, str]]:
    """Let a model continue each prompt, as if the prompt began a document. Chat templates are not applied.

    The next token is drawn from the 40 likeliest at temperature 0.7: greedy decoding of a small model soon repeats
    itself. The random generator is keyed by the seed and the prompt's number, so the same model generates the same
    text.

    Args:
        model: The model, on its device.
        tokenizer: Tokenizer with an end-of-sequence token.
        prompts: Texts to continue, possibly empty. A prompt that is too long loses its beginning.
        tokens: Maximum tokens to add; fewer if the model ends the document or reaches its maximum length.
        seed: Seed of the run.
        prefix: The token before a document. By default it is the token that ends a document.
        ends: Tokens that end a text, in addition to the tokenizer's EOS.
        begin: Lets the model read a text from its beginning.

    Returns:
        For each prompt: `prompt`, and the generated continuation `text`.
    """
    model.eval()
    most = int(model.config.max_position_embeddings)
    added = min(tokens, most - 1)
    samples = []
    for number, prompt in enumerate(prompts):
        draws = np.random.Generator(np.random.Philox(key=[seed, number]))
        ids = [
            tokenizer.eos_token_id if prefix is None else prefix,
            *tokenizer(prompt, add_special_tokens=False)["input_ids"],
        ]
        last = {*ends, tokenizer.eos_token_id}
        written = _continue(
            begin(model), ids[added - most :], draws, tokens=added, vocabulary=len(tokenizer), ends=last
        )
        samples.append({"prompt": prompt, "text": tokenizer.decode(written)})
    return samples


@torch.inference_mode()
def _continue(
    read: NextLogits, ids: list[int], draws: np.random.Generator, *, tokens: int, vocabulary: int, ends: Collection[int]
) -> list[int]:
    written: list[int] = []
    while len(written) < tokens:
        logits_V = read([*ids, *written], 1 if written else len(ids))
        # The embedding may have more rows than the tokenizer has entries.
        token = _draw(logits_V[:vocabulary].double().cpu().numpy(), float(draws.random()))
        if token in ends:
            break
        written.append(token)
    return written


def _draw(logits_V: NDArray[np.float64], uniform: float) -> int:
    likeliest = np.argsort(-logits_V, kind="stable")[:_TOP_K]
    cumulative = np.cumsum(np.exp((logits_V[likeliest] - logits_V[likeliest[0]]) / _TEMPERATURE))
    place = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return int(likeliest[min(place, len(likeliest) - 1)])
