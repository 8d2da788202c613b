"""Sub-models as one causal language model, which mixes next-token probabilities (c-BTM, arXiv 2303.14177).

    p(x_t | x_<t) = sum_k w_k(x_<t) p_k(x_t | x_<t),    w_k proportional to exp(-d_k^2 / tau)

with d_k the distance of the text so far from the centre of cluster k. The weights are computed anew every
`router_block` tokens of a document, from the tokens before the block. In the first block, which has no context, they
are equal.

The export copies this file next to the weights, so it imports nothing of the package that it is
part of.

Shapes: B batch, L positions, D dimensions of a vector, V vocabulary, T terms, C clusters (one per sub-model).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

_CACHE = next(
    field.name for field in dataclasses.fields(CausalLMOutputWithPast) if field.name in ("cache", "past_key_values")
)
"""Name of the cache in transformers; older versions have the longer one."""
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_OF_THE_WHOLE = ("trust_remote_code", "code_revision", "adapter_kwargs", "proxies", "_from_auto")
"""Arguments of `from_pretrained` that do not concern the sub-models, which need no code of their own."""
_REMEMBERED = 256
"""Number of contexts whose weights are remembered: while a block is generated, its context stays the same."""
_WORD = re.compile(r"\b\w\w+\b")

Array = NDArray[Any]


class EnsembleConfig(PretrainedConfig):
    """Configuration of the ensemble.

    Attributes:
        num_submodels: Number of sub-models, in the folders `0`, `1`, ...
        router_block: Number of consecutive tokens that are predicted with the same weights.
        router_temperature: Temperature tau, in units of a squared distance.
        document_start: Token from which a document's first token is predicted; the router does not read it.
    """

    model_type = "moedisco_ensemble"

    vocab_size: int = 0
    num_submodels: int = 0
    router_block: int = 64
    router_temperature: float = 0.1
    document_start: int = 0


class MeanToken:
    """Mean of a text's token embeddings."""

    def __init__(self, directory: Path, **_: Any) -> None:
        self._table_VD = load_file(directory / "vectoriser.safetensors")["table"]

    def __call__(self, tokens: Sequence[int]) -> Array:
        """The vector [D] of a text's tokens."""
        mean_D: Array = self._table_VD[list(tokens)].mean(axis=0)
        return mean_D


class TfidfSvd:
    """Tf-idf of a text's words with sublinear term frequency, reduced by an SVD, of length 1."""

    def __init__(self, directory: Path, **_: Any) -> None:
        self._tokenizer = Tokenizer.from_str(_json(directory / "encoding.json")["serialised"])
        self._columns = {term: column for column, term in enumerate(_json(directory / "vocabulary.json"))}
        with np.load(directory / "vectoriser.npz", allow_pickle=False) as arrays:
            self._idf_T, self._components_DT = arrays["idf"], arrays["components"]

    def __call__(self, tokens: Sequence[int]) -> Array:
        """The vector [D] of a text's tokens."""
        words = _WORD.findall(self._tokenizer.decode(list(tokens), skip_special_tokens=False).lower())
        counts = Counter(self._columns[word] for word in words if word in self._columns)
        columns = list(counts)
        frequency_T = np.log([float(counts[column]) for column in columns]) + 1
        return unit_length(self._components_DT[:, columns] @ (frequency_T * self._idf_T[columns]))


class HiddenState(nn.Module):
    """Mean last hidden state of a model over a text's first tokens, centred, of length 1."""

    def __init__(self, directory: Path, *, max_tokens: int, **loading: Any) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(
            directory / "model", trust_remote_code=False, **loading
        ).base_model
        self._centre_D = load_file(directory / "vectoriser.safetensors")["centre"]
        self._max_tokens = max_tokens

    @torch.no_grad()
    def forward(self, tokens: Sequence[int]) -> Array:
        """The vector [D] of a text's tokens."""
        tokens_BL = torch.tensor([tokens[: self._max_tokens]], device=self.model.device)
        hidden_LD = self.model(input_ids=tokens_BL, use_cache=False).last_hidden_state[0]
        return unit_length(hidden_LD.float().mean(dim=0).cpu().numpy() - self._centre_D)


STATES = "hidden_state"
"""Kind of document vectors that a model computes."""
VECTORS: dict[str, type[MeanToken | TfidfSvd | HiddenState]] = {
    "mean_token": MeanToken,
    "tfidf_svd": TfidfSvd,
    STATES: HiddenState,
}
"""Kinds of document vectors that a context has."""


class Router(nn.Module):
    """Weights of the sub-models for a context: softmax of its negative squared distances from the clusters' centres.

    Args:
        directory: Folder of the run's cluster model.
        temperature: Divisor of the squared distances.
        vector: Function that computes the vector [D] of a text's tokens; by default the one that the folder describes.
        loading: Arguments for `from_pretrained` of the model whose hidden states are the vectors.
    """

    def __init__(
        self,
        directory: Path,
        temperature: float,
        vector: Callable[[Sequence[int]], Array] | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        settings = _json(directory / "vectoriser.json")
        self.vector = VECTORS[settings.pop("kind")](directory, **settings, **loading) if vector is None else vector
        with np.load(directory / "clusters.npz", allow_pickle=False) as arrays:
            self._centroids_CD = arrays["centroids"]
        self._temperature = temperature
        self._remembered = functools.lru_cache(_REMEMBERED)(self._log_weights)

    def forward(self, tokens: Sequence[int]) -> Array:
        """Logarithms of the weights [C], float64; they are equal without a token."""
        return self._remembered(tuple(tokens))

    def _log_weights(self, tokens: tuple[int, ...]) -> Array:
        if not tokens:
            return np.full(len(self._centroids_CD), -np.log(len(self._centroids_CD)))
        difference_CD = self.vector(tokens).astype(np.float64) - self._centroids_CD
        scores_C = -np.square(difference_CD).sum(axis=1) / self._temperature
        log_w_C: Array = scores_C - np.logaddexp.reduce(scores_C)
        return log_w_C


class EnsembleCache(Cache):
    """The caches of all sub-models as one cache.

    Its layers are those of all of them together, so that it is reordered and cropped as one.
    """

    def __init__(self, models: Iterable[PreTrainedModel]) -> None:
        self.parts = [DynamicCache(config=model.config) for model in models]
        super().__init__(layers=[layer for part in self.parts for layer in part.layers])


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose logits are the logarithms of the sub-models' mixed probabilities."""

    config_class = EnsembleConfig

    def __init__(self, config: EnsembleConfig, submodels: Iterable[PreTrainedModel], router: Router) -> None:
        super().__init__(config)
        self.submodels = nn.ModuleList(submodels)
        self.router = router

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: EnsembleConfig | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> EnsembleForCausalLM:
        """Load all sub-models and the router; `kwargs`, such as dtype and device map, concern each of these models."""
        hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
        loading = {name: value for name, value in kwargs.items() if name not in _OF_THE_WHOLE}
        directory = Path(pretrained_model_name_or_path)
        if not directory.is_dir():
            directory = Path(snapshot_download(str(pretrained_model_name_or_path), **hub))
        directory /= subfolder
        config = EnsembleConfig.from_pretrained(directory) if config is None else config
        submodels = [
            AutoModelForCausalLM.from_pretrained(directory / str(k), trust_remote_code=False, **loading)
            for k in range(config.num_submodels)
        ]
        model = cls(config, submodels, Router(directory / "router", config.router_temperature, **loading))
        model.generation_config = submodels[0].generation_config
        return model.eval()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: the weights stay in the sub-models' folders."""
        raise NotImplementedError("an ensemble is stored by copying its directory")

    def log_weights(self, document_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logarithms of the weights with which each position's next token is predicted, float32 [B, L, C].

        Args:
            document_ids: Token ids [B, L] from the beginning of the text.
            attention_mask: Mask [B, L], 0 at padding; None without padding.
        """
        block, rows = self.config.router_block, []
        mask_BL = torch.ones_like(document_ids) if attention_mask is None else attention_mask
        for ids_L, real_L in zip(document_ids.cpu(), mask_BL.bool().cpu(), strict=True):
            tokens = ids_L[real_L].tolist()
            start = int(tokens[:1] == [self.config.document_start])
            # A position predicts the next token, whose number in the document is that of the tokens so far, without the
            # start.
            block_L = ((real_L.cumsum(dim=0) - start).clamp(min=0) // block).tolist()
            known = {number: self.router(tokens[start : start + number * block]) for number in set(block_L)}
            rows.append(np.stack([known[number] for number in block_L]))
        return torch.from_numpy(np.stack(rows)).float().to(document_ids.device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logarithms of the mixed probabilities of the next tokens, float32 [B, L, V].

        Args:
            input_ids: Token ids.
            attention_mask: Mask, 0 at padding, of all tokens so far.
            labels: The tokens to predict, such as `input_ids`; -100 where none counts.
            use_cache: Whether to return a cache.
            logits_to_keep: Number of last positions to compute; 0 means all.
            document_ids: All tokens so far, if `input_ids` are only the last ones; `generate` passes them.
            kwargs: Further arguments for the sub-models.
        """
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))
        kwargs.pop("return_dict", None)
        if cache is None and use_cache:
            cache = EnsembleCache(self.submodels)
        if document_ids is None and cache is not None and cache.get_seq_length():
            raise ValueError("the router reads the text from its beginning; pass all tokens so far as document_ids")
        so_far = input_ids if document_ids is None else document_ids
        whole = attention_mask is not None and attention_mask.shape == so_far.shape
        log_w_BLC = self.log_weights(so_far, attention_mask if whole else None)
        mixed_BLV: Tensor | None = None
        for k, model in enumerate(self.submodels):
            own = {} if cache is None else {_CACHE: cache.parts[k]}
            logits_BLV = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
                logits_to_keep=logits_to_keep,
                **own,
                **kwargs,
            ).logits.to(input_ids.device, torch.float32)
            log_p_BLV = logits_BLV.log_softmax(dim=-1) + log_w_BLC[:, -logits_BLV.shape[1] :, k, None]
            mixed_BLV = log_p_BLV if mixed_BLV is None else torch.logaddexp(mixed_BLV, log_p_BLV)
        loss = (
            None
            if labels is None
            else self.loss_function(logits=mixed_BLV, labels=labels, vocab_size=self.config.vocab_size)
        )
        return CausalLMOutputWithPast(loss=loss, logits=mixed_BLV, **{_CACHE: cache})

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The inputs of one step of `generate`: those of any model, and all tokens so far."""
        return {**super().prepare_inputs_for_generation(input_ids, **kwargs), "document_ids": input_ids}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes an EnsembleCache


def unit_length(x_D: Array) -> Array:
    """A vector [D] scaled to length 1, float32; zero stays zero."""
    norm = np.sqrt(np.square(x_D, dtype=np.float64).sum())
    return (x_D / (norm or 1.0)).astype(np.float32)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
