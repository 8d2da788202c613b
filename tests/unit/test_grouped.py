"""Products of all experts are equal with and without torch's kernel for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moedisco_ray.models import grouped
from moedisco_ray.models.grouped import Rows, grouped_product, has_kernel


def products(counts: Sequence[int], dtype: torch.dtype, *, transposed: bool) -> list[Tensor]:
    """The results of a grouped product and its gradients."""
    random = torch.Generator().manual_seed(sum(counts))
    x_SA = torch.randn(sum(counts), 24, generator=random).to(dtype).requires_grad_()
    shape = (len(counts), 16, 24) if transposed else (len(counts), 24, 16)
    stack = torch.randn(shape, generator=random).to(dtype).requires_grad_()
    rows = Rows(torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), len(counts))
    y_SB = grouped_product(x_SA, stack.mT if transposed else stack, rows)
    return [y_SB, *torch.autograd.grad(y_SB, (x_SA, stack), torch.randn(y_SB.shape, generator=random).to(dtype))]


@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_products_of_one_expert_after_the_other_have_the_bits_of_torchs_grouped_product(
    counts: list[int], dtype: torch.dtype, transposed: bool
) -> None:
    expected = products(counts, dtype, transposed=transposed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "has_kernel", lambda _: False)
        found = products(counts, dtype, transposed=transposed)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "has"),
    [
        ((9, 0), torch.bfloat16, (2048, 1024), True),
        ((10, 0), torch.bfloat16, (2048, 1024), True),
        ((8, 9), torch.bfloat16, (2048, 1024), False),
        ((12, 0), torch.bfloat16, (2048, 1024), False),
        ((9, 0), torch.float32, (2048, 1024), False),
        ((9, 0), torch.bfloat16, (2048, 1020), False),
        ((9, 0), torch.bfloat16, (2044, 1024), False),
    ],
)
def test_torchs_kernel_is_for_some_cards_bf16_and_multiples_of_8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, int], has: bool
) -> None:
    """Before: torch refused other sizes on such a card, with an error about strides."""

    class OnCard(Tensor):
        device = torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert has_kernel(torch.empty(4, *sizes, dtype=dtype, device="meta").as_subclass(OnCard)) is has
