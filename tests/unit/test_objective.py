from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from moedisco_ray.core.config import FAMILIES, Architecture
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import hf_config, log_probabilities, routers, skeleton, specialise
from moedisco_ray.stages.routers import dead_experts, expert_load
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.objective import (
    RouterProbe,
    RouterSums,
    expert_balance,
    load_balance_loss,
    uniform_fractions,
    z_loss,
)

B, L, V, E, K, LAYERS = 3, 8, 64, 4, 2, 2
T = B * L


def tiny(family: str = "qwen3_moe", experts: int = E) -> torch.nn.Module:
    sizes = Architecture(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        moe_intermediate_size=24,
        num_experts=experts,
        num_experts_per_tok=min(K, experts),
    )
    torch.manual_seed(0)
    model = type(skeleton(hf_config(family, sizes, V, L, 0)))(hf_config(family, sizes, V, L, 0))
    for router in routers(model).values():
        torch.nn.init.normal_(router.weight)  # far from balanced
    return model


def tokens(rows: int = B) -> Tensor:
    return torch.randint(0, V, (rows, L), generator=torch.Generator().manual_seed(1))


def recorded(model: torch.nn.Module, ids: Tensor, weights: Tensor | None = None) -> tuple[RouterSums, Tensor]:
    probe = RouterProbe(model)
    with probe.recording(weights):
        logits = model(input_ids=ids, use_cache=False).logits
    return probe.sums(), logits


def test_token_loss_is_hugging_faces_loss_times_its_tokens() -> None:
    model, ids = tiny(), tokens()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        hidden_TD = model.base_model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        ours = summed_cross_entropy(hidden_TD, model.lm_head.weight, ids[:, 1:].flatten())
    assert ours / (B * (L - 1)) == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_sees_every_router_of_every_family_and_matches_transformers(family: str) -> None:
    model, ids = specialise(tiny(family)), tokens()
    sums, _ = recorded(model, ids)
    logits = model(input_ids=ids, output_router_logits=True, use_cache=False).router_logits
    assert len(logits) == LAYERS == len(sums.probabilities_NE)
    fractions = sums.selections_NE / T
    torch.testing.assert_close(fractions.sum(dim=1), torch.full((LAYERS,), float(K)))
    kind = DECLARATIONS[family].router
    # transformers takes the softmax of its argument, so it gets the logarithms of a sigmoid router's probabilities.
    per_layer = torch.stack([load_balancing_loss_func((log_probabilities(layer, kind),), E, K) for layer in logits])
    torch.testing.assert_close(load_balance_loss(sums.probabilities_NE, fractions, T), per_layer.mean())
    reference = torch.stack([torch.logsumexp(layer, -1).square().mean() for layer in logits]).mean()
    torch.testing.assert_close(z_loss(sums.log_partition_N, T), reference)


def test_load_balance_loss_by_hand() -> None:
    # Two experts, top-1, 4 tokens: expert 0 is chosen 3 times and has a mean probability of 0.7.
    loss = load_balance_loss(torch.tensor([[2.8, 1.2]]), torch.tensor([[0.75, 0.25]]), 4)
    assert loss.item() == pytest.approx(2 * (0.75 * 0.7 + 0.25 * 0.3))
    balanced = load_balance_loss(torch.full((3, 4), T / 4), uniform_fractions(3, 4, 2), T)
    assert balanced.item() == pytest.approx(2)


def test_z_loss_by_hand() -> None:
    logits = torch.zeros(5, 4)
    assert z_loss(torch.logsumexp(logits, -1).square().sum()[None], 5).item() == pytest.approx(math.log(4) ** 2)


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    skewed = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert load_balance_loss(skewed * T, skewed, T).item() == pytest.approx(2)


def test_sums_of_parts_are_the_sums_of_the_whole_and_weight_zero_counts_nothing() -> None:
    model, ids = tiny(), tokens()
    whole, _ = recorded(model, ids)
    first, _ = recorded(model, ids[:1])
    filled = torch.cat([ids[1:], torch.zeros(2, L, dtype=torch.long)])
    weights = torch.tensor([1.0, 1, 0, 0]).repeat_interleave(L)
    rest, _ = recorded(model, filled, weights)
    for name in ("probabilities_NE", "log_partition_N", "selections_NE"):
        torch.testing.assert_close(getattr(first, name) + getattr(rest, name), getattr(whole, name))


def test_activation_checkpointing_changes_neither_sums_nor_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        probe = RouterProbe(model)
        for _ in range(2):  # a second pass would trip over anything that the first recomputation left behind
            model.zero_grad()
            with probe.recording():
                hidden_BLD = model.base_model(input_ids=tokens(), use_cache=False).last_hidden_state
            sums = probe.sums()
            loss = summed_cross_entropy(hidden_BLD.flatten(0, 1), model.lm_head.weight, tokens().flatten()) / T
            loss += z_loss(sums.log_partition_N, T)
            (loss + load_balance_loss(sums.probabilities_NE, sums.selections_NE / T, T)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def test_the_router_losses_reach_the_router() -> None:
    model = tiny()
    sums, _ = recorded(model, tokens())
    (load_balance_loss(sums.probabilities_NE, sums.selections_NE / T, T) + z_loss(sums.log_partition_N, T)).backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers(model).values())


def test_layers_with_one_expert_are_not_probed() -> None:
    assert RouterProbe(tiny(experts=1)).layers == 0


@given(st.integers(1, 3), st.integers(2, 6), st.data())
def test_the_expert_balance_of_training_is_that_of_the_evaluation(
    layers: int, experts: int, data: st.DataObject
) -> None:
    row = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts).filter(any)
    counts_NE = np.array([data.draw(row) for _ in range(layers)])
    found = expert_balance(torch.tensor(counts_NE, dtype=torch.float64) / 7)
    load_NE = expert_load(counts_NE)
    assert found["largest_load"] == pytest.approx(load_NE.max() * experts)
    assert found["dead_experts"] == sum(dead_experts(load_E) for load_E in load_NE)
    assert expert_balance(uniform_fractions(layers, experts, 1)) == {"largest_load": 1.0, "dead_experts": 0}
    assert expert_balance(torch.zeros(0, 0)) == {}
