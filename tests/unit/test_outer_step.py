from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moedisco_ray.core.config import Outer
from moedisco_ray.policies.sync_points import token_weights
from moedisco_ray.training.sync import outer_step as module

Tensors = dict[str, Tensor]


def outer_step(
    start: Tensors, members: list[Tensors], weights: list[float], momentum: Tensors | None, outer: Outer
) -> tuple[Tensors, Tensors]:
    common, after = {}, {}
    for key, tensor in start.items():
        copies = (member[key] for member in members)
        common[key], after[key] = module.outer_step(tensor, copies, weights, momentum and momentum[key], outer)
    return common, after


def drawn(seed: int, members: int, dtype: torch.dtype = torch.float32) -> tuple[Tensors, list[Tensors]]:
    generator = torch.Generator().manual_seed(seed)
    start = {"a": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator)}

    def moved(tensor: Tensor) -> Tensor:
        return (tensor + 0.1 * torch.randn(tensor.shape, generator=generator)).to(dtype)

    copies = []
    for _ in range(members):
        copy = {key: moved(tensor) for key, tensor in start.items()}
        copies.append(copy)
    return start, copies


def test_two_rounds_by_hand() -> None:
    outer = Outer(lr=0.5, momentum=0.5)
    start = {"w": torch.tensor([4.0, 0.0])}
    # d = 3/4 (4 - 2, 0 - 1) + 1/4 (4 - 6, 0 + 1) = (1, -1/2);  m = d;  g = (4, 0) - 1/2 (d + m / 2)
    members = [{"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([6.0, -1.0])}]
    backbone, momentum = outer_step(start, members, [0.75, 0.25], None, outer)
    assert momentum["w"].tolist() == [1.0, -0.5]
    assert backbone["w"].tolist() == [3.25, 0.375]
    # d = (3.25 - 1.25, 0.375 - 0.375) = (2, 0);  m = (2.5, -0.25);  g = (3.25, 0.375) - 1/2 (d + m / 2)
    backbone, momentum = outer_step(backbone, [{"w": torch.tensor([1.25, 0.375])}], [1.0], momentum, outer)
    assert momentum["w"].tolist() == [2.5, -0.25]
    assert backbone["w"].tolist() == [1.625, 0.4375]


@given(seed=st.integers(0, 99), lr=st.floats(0.1, 1.5), momentum=st.floats(0.1, 0.95), members=st.integers(1, 4))
def test_equals_sgd_of_torch_on_the_mean_delta(seed: int, lr: float, momentum: float, members: int) -> None:
    start, _ = drawn(seed, 0)
    reference = {key: value.double().clone().requires_grad_() for key, value in start.items()}
    sgd = torch.optim.SGD(reference.values(), lr=lr, momentum=momentum, nesterov=True)
    weights = token_weights([1 + k for k in range(members)])
    kept: Tensors | None = None
    for step in range(3):
        _, copies = drawn(seed + 100 * step, members)
        for key, parameter in reference.items():
            parameter.grad = sum(
                (w * (parameter.detach() - copy[key].double()) for w, copy in zip(weights, copies, strict=True)),
                torch.zeros_like(parameter),
            )
        sgd.step()
        start, kept = outer_step(start, copies, weights, kept, Outer(lr=lr, momentum=momentum))
    for key, parameter in reference.items():
        torch.testing.assert_close(start[key].double(), parameter.detach(), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 99), tokens=st.lists(st.integers(1, 1000), min_size=1, max_size=5))
def test_at_rate_one_without_momentum_it_is_the_weighted_average(seed: int, tokens: list[int]) -> None:
    start, copies = drawn(seed, len(tokens))
    weights = token_weights(tokens)
    assert sum(weights) == pytest.approx(1)
    backbone, _ = outer_step(start, copies, weights, None, Outer(lr=1.0, momentum=0.0))
    for key in start:
        average = sum(w * copy[key].double() for w, copy in zip(weights, copies, strict=True))
        torch.testing.assert_close(backbone[key].double(), average, rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 99), order=st.permutations(range(4)))
def test_the_order_of_the_members_does_not_matter(seed: int, order: list[int]) -> None:
    start, copies = drawn(seed, 4)
    weights = token_weights([5, 1, 2, 4])
    one = outer_step(start, copies, weights, None, Outer(lr=0.7, momentum=0.9))
    other = outer_step(
        start, [copies[i] for i in order], [weights[i] for i in order], None, Outer(lr=0.7, momentum=0.9)
    )
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_members_that_did_not_move_leave_only_the_momentum() -> None:
    start, _ = drawn(3, 0)
    kept = {key: torch.full_like(value, 2.0) for key, value in start.items()}
    for dtype in (torch.float32, torch.bfloat16):  # in bf16 a member begins from the rounded backbone: that is no move
        copies = [{key: value.to(dtype) for key, value in start.items()}] * 2
        backbone, momentum = outer_step(start, copies, [0.5, 0.5], kept, Outer(lr=0.5, momentum=0.5))
        for key, value in start.items():
            assert torch.equal(momentum[key], torch.full_like(value, 1.0))
            torch.testing.assert_close(backbone[key], value - 0.25)
