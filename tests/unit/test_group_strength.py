"""A merged router keeps a token's experts in one group, so that none of them is a copy of another."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import LENGTH, VOCAB, random_tensors, tiny_config
from sklearn.decomposition import PCA
from torch import Tensor, nn

from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import ModelMap, Selection, load_model, routers, runnable, submodel_config, write_checkpoint
from moedisco_ray.models.initial_weights import random_weights, with_seed
from moedisco_ray.stages.merge.calibrate import RouterSettings, calibrated
from moedisco_ray.stages.merge.group_strength import SHARE, group_strength
from moedisco_ray.stages.merge.router_init import principal_directions, ridge_directions, statistics
from moedisco_ray.stages.merge.router_load import Measured

GROUP, K, D = 4, 2, 12


def measured(experts: int, top_k: int = K) -> Measured:
    kind = DECLARATIONS["qwen3_moe"].router
    selection = Selection.of(kind, {kind.top_k_field: top_k})
    return Measured(kind, selection, selection, nn.Linear(D, experts, bias=False), experts // GROUP)


def copies(clusters: int, seed: int = 0, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, their clusters, the rows of a seed's experts copied into every group, and the clusters' directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, D, generator=generator, dtype=torch.float64)
    cluster_T = torch.randint(0, clusters, (600,), generator=generator)
    x_TD = centres[cluster_T] + spread * torch.randn(600, D, generator=generator, dtype=torch.float64)
    own_gD = torch.randn(GROUP, D, generator=generator, dtype=torch.float64)
    return x_TD, cluster_T, own_gD.repeat(clusters, 1), ridge_directions(statistics(x_TD, cluster_T, clusters))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(0, 100))
def test_most_tokens_select_what_the_copied_experts_seed_selects(clusters: int, seed: int) -> None:
    x_TD, cluster_T, own_ED, direction_CD = copies(clusters, seed)
    router = measured(len(own_ED))
    strength = group_strength(router, own_ED, direction_CD, [(x_TD, cluster_T)])
    rows_ED = own_ED + strength * direction_CD.repeat_interleave(GROUP, dim=0)
    index_TK, weight_TK = router.selected(x_TD, rows_ED)
    one_T = (index_TK // GROUP == index_TK[:, :1] // GROUP).all(1)
    assert one_T.double().mean() >= SHARE
    seed_TK, seed_weight_TK = measured(GROUP).selected(x_TD, own_ED[:GROUP])
    assert torch.equal(index_TK[one_T] % GROUP, seed_TK[one_T])
    ratio_T = (weight_TK / seed_weight_TK)[one_T]
    torch.testing.assert_close(ratio_T[:, 0], ratio_T[:, 1])
    weaker = strength / 2**0.5
    if weaker >= 1:
        weaker_TK, _ = router.selected(x_TD, own_ED + weaker * direction_CD.repeat_interleave(GROUP, dim=0))
        assert (weaker_TK // GROUP == weaker_TK[:, :1] // GROUP).all(1).double().mean() < SHARE


def test_the_strength_follows_the_size_of_the_experts_rows() -> None:
    x_TD, cluster_T, own_ED, direction_CD = copies(2)
    few, many = (group_strength(measured(8), size * own_ED, direction_CD, [(x_TD, cluster_T)]) for size in (1, 4))
    assert many == pytest.approx(4 * few)
    parts = [(x_TD[:100], cluster_T[:100]), (x_TD[100:], cluster_T[100:])]
    assert group_strength(measured(8), own_ED, direction_CD, parts) == few


@pytest.mark.parametrize(("clusters", "top_k"), [(1, 2), (2, GROUP + 1)])
def test_groups_that_cannot_hold_all_selected_experts_are_left_alone(clusters: int, top_k: int) -> None:
    x_TD, cluster_T, own_ED, direction_CD = copies(clusters)
    assert group_strength(measured(len(own_ED), top_k), own_ED, direction_CD, [(x_TD, cluster_T)]) == 1


def test_two_principal_directions_are_the_sides_of_scikit_learns_first_component() -> None:
    x_TD, cluster_T, _, _ = copies(3)
    x_TD = x_TD + 2.0
    w_CD = principal_directions(statistics(x_TD, cluster_T, 3), 2)
    component_D = PCA(1).fit(x_TD.numpy()).components_[0]
    found_T, wanted_T = (x_TD @ (w_CD[0] - w_CD[1])).numpy(), (x_TD - x_TD.mean(0)).numpy() @ component_D
    assert abs(np.corrcoef(found_T, wanted_T)[0, 1]) > 0.97  # not 1: a direction replaces the bias
    assert float((x_TD.mean(0) @ w_CD.T).abs().max()) < 0.05


@pytest.mark.parametrize("clusters", [2, 3, 5, D + 3])
def test_principal_directions_are_normalised_and_treat_clusters_alike(clusters: int) -> None:
    x_TD, cluster_T, _, _ = copies(4, spread=1.0)
    x_TD = x_TD - x_TD.mean(0)
    logits_TC = x_TD @ principal_directions(statistics(x_TD, cluster_T, 4), clusters).T
    assert float(logits_TC.square().mean()) == pytest.approx(1)
    torch.testing.assert_close(logits_TC.sum(1), torch.zeros(len(x_TD), dtype=torch.float64), atol=1e-9, rtol=0)
    if clusters <= D:
        torch.testing.assert_close(logits_TC.var(0), logits_TC.var(0).mean().expand(clusters), rtol=1e-6, atol=0)


def same_expert_twice(config: dict[str, object], method: str, directory: Path) -> list[float]:
    """By layer, the share of tokens that select both copies of an expert, in a seed grown from half of the experts."""
    names = ModelMap(str(config["model_type"]))
    seed = random_tensors(submodel_config(config, GROUP), seed=5)
    whole = with_seed(seed, random_weights(config, 1), names, distinct_rows=method == "kept")
    generator = np.random.default_rng(0)
    batches = [(generator.integers(0, VOCAB, (8, LENGTH)), np.zeros(8, dtype=np.int64)) for _ in range(8)]
    write_checkpoint(
        directory, calibrated(whole.items(), config, 2, batches, settings=RouterSettings(method), report=[]), config
    )
    model, found = runnable(load_model(directory)), []
    for router in routers(model).values():
        router.register_forward_hook(lambda _, __, output: found.append(output[2] % GROUP))
    with torch.no_grad():
        model(torch.as_tensor(np.concatenate([tokens_BL for tokens_BL, _ in batches])))
    return [float((index_TK[:, 0] == index_TK[:, 1]).double().mean()) for index_TK in found]


def test_a_grown_seed_selects_few_experts_twice(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", 2 * GROUP)
    assert config["num_experts_per_tok"] == K
    assert min(same_expert_twice(config, "kept", tmp_path / "noise")) > 0.5
    assert max(same_expert_twice(config, "principal", tmp_path / "divided")) <= 1.2 * (1 - SHARE)
