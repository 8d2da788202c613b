"""Attention in which tokens of packed sequences attend only to their own document, by the kernel that the device has.

On GPUs that can, FlashAttention computes each document by itself and needs no mask. Everywhere else, scaled dot-product
attention gets one mask that all layers share, in the dtype of its inputs: torch would convert a boolean mask in every
layer, and keep every copy for the backward pass.

Shapes: B sequences, L positions, T = B L tokens, N documents, H attention heads, G key-value heads, d head size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.limits import FLASH_HEAD_SIZE, FLASH_HEAD_STEP
from moedisco_ray.models.hf import family_of

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]  # mypy sees the installed version

MASKED, BY_DOCUMENT = "moedisco_masked", "moedisco_by_document"
"""Names of the two implementations in transformers."""
_KINDS = frozenset({"full_attention", "sliding_attention"})
"""Kinds of layers that see a document through their attention alone."""
_LEAST_CAPABILITY = (8, 0)
"""Compute capability that torch's FlashAttention needs."""
_KERNEL_ERROR = 0.02
"""Largest difference between bf16 results of the kernel and of a mask, of numbers around 1."""


def attend_within_documents(model: PreTrainedModel, device: str, dtype: torch.dtype) -> None:
    """Choose how a model attends within the documents of packed sequences, in place.

    Args:
        model: The model, as transformers has made it.
        device: Device on which it will run.
        dtype: Dtype of its matrix products.

    Raises:
        ConfigError: A layer has a state that passes from one document to the next.
    """
    if (other := carries_state(model.config)) is not None:
        raise ConfigError(
            "optimizer.within_documents",
            value=True,
            remedy=(
                f"does not hold in layers of kind {other}, which carry a state from one document to the next; "
                "set it to false"
            ),
        )
    if model.config._attn_implementation == "sdpa":  # noqa: SLF001 - transformers has no other name for it
        model.set_attn_implementation(BY_DOCUMENT if _has_kernel(model, device, dtype) else MASKED)


def carries_state(config: PretrainedConfig) -> str | None:
    """Kind of the layers that carry a state from one document to the next; None if no layer does."""
    return min(set(getattr(config, "layer_types", None) or ()) - _KINDS, default=None)


def bounds_for(model: PreTrainedModel, positions_BL: Tensor | None) -> Tensor | None:
    """`document_bounds` if the model computes each document by itself, else None.

    The CPU waits for a GPU to learn them, so what runs layer by layer asks once for all layers.
    """
    by_document = model.config._attn_implementation == BY_DOCUMENT  # noqa: SLF001 - as above
    return document_bounds(positions_BL) if by_document and positions_BL is not None else None


def document_arguments(
    model: PreTrainedModel, input_ids: Tensor, positions_BL: Tensor | None, bounds_N: Tensor | None = None
) -> dict[str, Any]:
    """Arguments with which transformers' forward pass hides other documents; none if `positions_BL` is None.

    Args:
        model: The model.
        input_ids: Token ids [B, L].
        positions_BL: Position of each token in its document; a position that is not its predecessor plus one begins a
            document.
        bounds_N: Result of `bounds_for`, if it is known already.
    """
    if positions_BL is None:
        return {}
    if bounds_N is None:
        bounds_N = bounds_for(model, positions_BL)
    if bounds_N is not None:
        length = positions_BL.shape[1]
        return {
            "position_ids": positions_BL,
            "cu_seq_lens_q": bounds_N,
            "cu_seq_lens_k": bounds_N,
            "max_length_q": length,
            "max_length_k": length,
        }
    if family_of(model).separates_documents:
        return {"position_ids": positions_BL}
    # transformers reads only batch, length, dtype and device of embeddings.
    embedded_BLD = torch.empty((), dtype=model.dtype, device=input_ids.device).expand(*input_ids.shape, 1)
    given = {
        "config": model.config,
        "inputs_embeds": embedded_BLD,
        "attention_mask": None,
        "cache": None,
        "position_ids": positions_BL,
    }
    masks = {
        "full_attention": create_causal_mask(**given),
        "sliding_attention": create_sliding_window_causal_mask(**given),
    }
    return {"position_ids": positions_BL, "attention_mask": masks}


def document_bounds(positions_BL: Tensor) -> Tensor:
    """First token of each document, and T at the end, as int32.

    T is repeated up to a power of two: a compiled layer has a graph for each number of documents.
    """
    starts_N = (positions_BL.flatten() == 0).nonzero().flatten()
    tokens = positions_BL.numel()
    return functional.pad(starts_N.int(), (0, (1 << len(starts_N).bit_length()) - len(starts_N)), value=tokens)


def _has_kernel(model: PreTrainedModel, device: str, dtype: torch.dtype) -> bool:
    config: Any = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = family_of(model).attention
    drops = bool(getattr(config, "attention_dropout", False))
    suits = not (attention.latent or attention.sinks or drops)
    return (
        suits
        and dtype is torch.bfloat16
        and size <= FLASH_HEAD_SIZE
        and size % FLASH_HEAD_STEP == 0
        and torch.device(device).type == "cuda"
        and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY
        and varlen_attn is not None
        and _kernel_works(device)
    )


@functools.cache
def _kernel_works(device: str) -> bool:
    """Whether the kernel computes on this device what a mask does.

    The interface is young, and builds of torch may lack it.
    """
    B, L, H, G, d = 2, 24, 4, 2, 64
    random = torch.Generator(device).manual_seed(0)
    q_BHLd, k_BGLd, v_BGLd = (
        torch.randn(B, heads, L, d, generator=random, device=device, dtype=torch.bfloat16).requires_grad_()
        for heads in (H, G, G)
    )
    positions_BL = (torch.arange(L, device=device) % 10).expand(B, L)
    bounds_N = document_bounds(positions_BL)
    document_BL = (positions_BL == 0).cumsum(dim=1)
    order_L = torch.arange(L, device=device)
    near_LL = (order_L[:, None] >= order_L) & (order_L[:, None] - order_L < 4)
    mask_B1LL = (near_LL & (document_BL[:, :, None] == document_BL[:, None, :]))[:, None]
    k_BHLd, v_BHLd = (each.repeat_interleave(H // G, dim=1) for each in (k_BGLd, v_BGLd))
    expected = functional.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, attn_mask=mask_B1LL).transpose(1, 2)
    given = (q_BHLd, k_BGLd, v_BGLd)
    try:
        found, _ = _by_document(None, *given, (3, 0), cu_seq_lens_q=bounds_N)
        pairs = zip(
            (found, *torch.autograd.grad(found.float().square().sum(), given)),
            (expected, *torch.autograd.grad(expected.float().square().sum(), given)),
            strict=True,
        )
        return all(torch.allclose(one, other, rtol=_KERNEL_ERROR, atol=4 * _KERNEL_ERROR) for one, other in pairs)
    except (RuntimeError, TypeError):  # torch has no such kernel for this device, or an earlier form of the function
        return False


def _by_document(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: tuple[int, int], **settings: Any
) -> tuple[Tensor, None]:
    """Attention [B, L, H, d] of each document by itself. The names of arguments are those of transformers.

    Args:
        module: The attention module; not used.
        query: Queries [B, H, L, d].
        key: Keys [B, G, L, d].
        value: Values [B, G, L, d].
        attention_mask: How many tokens before and after itself a token attends to; -1 before means all.
        settings: `scaling`, a factor on the scores, by default d^-0.5; `cu_seq_lens_q`, see `document_bounds`: without
            it, each sequence is one document.
    """
    del module
    B, H, L, _ = query.shape
    # Autocast does not know this operation. Normalised queries and keys are fp32 under autocast.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    q_THd, k_TGd, v_TGd = (each.transpose(1, 2).flatten(0, 1).to(dtype) for each in (query, key, value))
    bounds_N = settings.get("cu_seq_lens_q")
    if bounds_N is None:
        bounds_N = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=query.device)
    found_THd: Any = varlen_attn(
        q_THd,
        k_TGd,
        v_TGd,
        cu_seq_q=bounds_N,
        cu_seq_k=bounds_N,
        max_q=L,
        max_k=L,
        scale=settings.get("scaling"),
        window_size=attention_mask,
        enable_gqa=key.shape[1] != H,
    )
    return found_THd.view(B, L, H, -1), None


def _window(*_: Any, local_size: int | None = None, **__: Any) -> tuple[int, int]:
    """What `_by_document` gets in place of a mask. Some families' layers pass the window to the mask alone."""
    return (-1 if local_size is None else local_size - 1), 0


def _shared_mask(*args: Any, dtype: torch.dtype, device: torch.device, **kwargs: Any) -> Tensor | None:
    """The mask of transformers [B, 1, L, L] as numbers that are added to scores, in the dtype of attention."""
    mask_B1LL = sdpa_mask(*args, device=device, **kwargs)
    if mask_B1LL is None:
        return None
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    return torch.zeros((), dtype=dtype, device=device).where(mask_B1LL, -torch.inf)


AttentionInterface.register(MASKED, sdpa_attention_forward)
AttentionMaskInterface.register(MASKED, _shared_mask)
AttentionInterface.register(BY_DOCUMENT, _by_document)
AttentionMaskInterface.register(BY_DOCUMENT, _window)
