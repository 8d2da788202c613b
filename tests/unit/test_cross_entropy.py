"""The cross-entropy in tiles against the one of all logits."""

from __future__ import annotations

import itertools

import pytest
import torch
from drawn import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.profiler import ProfilerActivity, profile

from moedisco_ray.core.limits import LOGITS_BYTES
from moedisco_ray.training import cross_entropy as module
from moedisco_ray.training.cross_entropy import summed_cross_entropy


def inputs(
    tokens: int, vocabulary: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head, and targets; every seventh is excluded."""
    random = torch.Generator().manual_seed(tokens + vocabulary)
    hidden_TD = torch.randn(tokens, width, generator=random)
    head_VD = torch.randn(vocabulary, width, generator=random) / width**0.5
    targets_T = torch.randint(vocabulary, (tokens,), generator=random)
    targets_T[::7] = -100
    return hidden_TD.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_(), targets_T


def whole(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients from the logits of all tokens at once."""
    hidden_TD, head_VD, *bias = (each.detach().requires_grad_() for each in (hidden_TD, head_VD, *bias))
    logits_TV = linear(hidden_TD, head_VD, *bias)
    loss = cross_entropy(
        logits_TV.float() if logits_TV.dtype is torch.bfloat16 else logits_TV, targets_T, reduction="sum"
    )
    return loss.detach(), *torch.autograd.grad(loss, (hidden_TD, head_VD, *bias))


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error of a tensor."""
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(2, 60),
    tile=st.integers(16, 2_000),
    rows=st.integers(1, 50),
    least=st.integers(1, 8),
    has_bias=st.booleans(),
)
@settings(max_examples=examples(50, 100), deadline=None)
def test_tiles_of_any_size_give_the_loss_and_gradients_of_all_logits(
    tokens: int, vocabulary: int, tile: int, rows: int, least: int, *, has_bias: bool
) -> None:
    hidden_TD, head_VD, targets_T = inputs(tokens, vocabulary, 8)
    bias = [torch.linspace(-1, 1, vocabulary).requires_grad_()] if has_bias else []
    exact, *gradients = whole(hidden_TD.double(), head_VD.double(), targets_T, *(each.double() for each in bias))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOGITS_BYTES", tile)
        patch.setattr(module, "TILE_TOKENS", rows)
        patch.setattr(module, "LEAST_TOKENS", least)
        loss = summed_cross_entropy(hidden_TD, head_VD, targets_T, *bias)
        torch.autograd.backward(3 * loss)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6, abs=1e-6)
    for each, expected in zip((hidden_TD, head_VD, *bias), gradients, strict=True):
        assert each.grad is not None
        torch.testing.assert_close(each.grad.double(), 3 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "vocabulary"),
    [
        (torch.bfloat16, 10_000),  # in one pass
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((torch.float32, 10_000), (torch.float32, 17_000), (torch.bfloat16, 17_000))  # in two
        ),
    ],
)
def test_tiles_are_as_exact_as_all_logits_and_take_64_mib(dtype: torch.dtype, vocabulary: int) -> None:
    hidden_TD, head_VD, targets_T = inputs(2_500, vocabulary, 64, dtype)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = summed_cross_entropy(hidden_TD, head_VD, targets_T)
        torch.autograd.backward(loss)
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    gradients = 6 * (hidden_TD.numel() + head_VD.numel())  # in fp32, and in the dtype
    assert max(itertools.accumulate(sizes)) < LOGITS_BYTES + gradients
    assert hidden_TD.grad is not None
    assert head_VD.grad is not None
    exact, *exact_gradients = whole(hidden_TD.double(), head_VD.double(), targets_T)
    plain, *plain_gradients = whole(hidden_TD, head_VD, targets_T)
    assert error(loss.detach(), exact) < max(1e-6, 1.5 * error(plain, exact))
    for ours, rounded, true in zip((hidden_TD.grad, head_VD.grad), plain_gradients, exact_gradients, strict=True):
        assert error(ours, true) < max(1e-6, 1.5 * error(rounded, true))


@pytest.mark.parametrize("vocabulary", [10_000, 20_000])
def test_autocast_multiplies_in_bf16_and_keeps_the_gradients_of_fp32_weights(vocabulary: int) -> None:
    hidden_TD, head_VD, targets_T = inputs(700, vocabulary, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = summed_cross_entropy(hidden_TD, head_VD, targets_T)
    torch.autograd.backward(loss)
    rounded, *gradients = whole(hidden_TD.bfloat16(), head_VD.bfloat16(), targets_T)
    assert head_VD.grad is not None
    assert loss.dtype is head_VD.grad.dtype is torch.float32
    assert error(loss.detach(), rounded.double()) < 1e-5
    assert error(head_VD.grad, gradients[1].double()) < 1e-2
