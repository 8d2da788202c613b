"""Experts refitted to a smaller model's routing: NumPy's solution, and transformers computes what is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import VOCAB
from test_chosen_experts import model_of
from transformers import AutoModelForCausalLM

from moedisco_ray.contrib.experts import refit
from moedisco_ray.contrib.experts.calibrate import calibrated_experts
from moedisco_ray.contrib.experts.chosen_experts import Chosen, config_with_experts, with_experts
from moedisco_ray.contrib.experts.refit import down_changes
from moedisco_ray.core.config import FAMILIES
from moedisco_ray.models import Role, open_checkpoint, same_bits, write_checkpoint

KEPT = (0, 2, 3, 6)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_down_projections_change_and_outputs_come_closer(family: str, tmp_path: Path) -> None:
    whole = open_checkpoint(model_of(family, tmp_path / "whole"))
    values, names = config_with_experts(whole.config, len(KEPT), 2), whole.model_map
    tokens_BL = torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(0))
    layers: list[dict[str, Any]] = []
    plain = dict(with_experts([whole], names, [Chosen(0, expert) for expert in KEPT]))
    found = dict(
        calibrated_experts(
            ((key, tensor.clone()) for key, tensor in plain.items()),
            values,
            [(tokens_BL.numpy(), np.zeros(8, dtype=int))],
            report=layers,
            whole=whole,
        )
    )
    assert found.keys() == plain.keys()
    changed = {key for key, tensor in plain.items() if not same_bits(found[key], tensor)}
    roles = {key: names.classify(key) for key in plain}
    # In a layer where all experts of every token stay, SparseMixer's weights stay too, so that nothing is to be
    # changed.
    differs = {layer["layer"] for layer in layers if layer["error_before"] > 0}
    down = {
        key
        for key, role in roles.items()
        if role.role is Role.EXPERT
        and role.layer in differs
        and role.part.endswith(("down", "experts.down_proj", "output_linear.weight"))
    }
    # The random corrections of these models may keep an expert from all tokens.
    assert changed == down or (names.family.router.correction is not None and changed < down)
    write_checkpoint(tmp_path / "smaller", found.items(), values)
    assert errors(tmp_path / "smaller", tmp_path / "whole", tokens_BL) == pytest.approx(
        [layer["error"] for layer in layers], rel=0.02, abs=1e-5
    )
    assert all(layer["error"] < layer["error_before"] for layer in layers if layer["layer"] in differs)
    assert len(differs) > 1


@torch.no_grad()
def errors(smaller: Path, whole: Path, tokens_BL: torch.Tensor) -> list[float]:
    """Mean squared difference between the experts' outputs of two models, as a share of the second's mean square."""
    model, other = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (smaller, whole))
    seen: dict[torch.nn.Module, Any] = {}
    blocks = [name.removesuffix(".experts") for name, _ in model.named_modules() if name.endswith(".experts")]
    for each in (each.get_submodule(f"{name}.experts") for each in (model, other) for name in blocks):
        each.register_forward_hook(lambda module, inputs, output: seen.update({module: (inputs[0], output)}))
    model(tokens_BL)
    found = []
    for name in blocks:
        x_TD, y_TD = seen[model.get_submodule(f"{name}.experts")]
        other.get_submodule(name)(x_TD[None])
        target_TD = seen[other.get_submodule(f"{name}.experts")][1]
        found.append(float((y_TD - target_TD).square().sum() / target_TD.square().sum()))
    return found


@pytest.mark.parametrize("tokens", [1, 5, 16, 40])
def test_one_turn_is_ridge_regression_with_few_and_with_many_tokens(tokens: int) -> None:
    hidden_SF, target_SD = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(tokens))
    found_FD = refit.Ridge.of(hidden_SF).solution(hidden_SF, target_SD)
    ridge = 0.01 * np.square(hidden_SF.double().numpy()).sum(0).mean()
    expected_FD = np.linalg.lstsq(
        np.concatenate([hidden_SF.double().numpy(), np.sqrt(ridge) * np.eye(16)]),
        np.concatenate([target_SD.double().numpy(), np.zeros((16, 16))]),
        rcond=None,
    )[0]
    np.testing.assert_allclose(found_FD.numpy(), expected_FD, atol=1e-4)


@pytest.mark.parametrize("kept", [4 << 30, 0])
def test_many_sweeps_reach_the_ridge_solution_of_all_experts_together(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With factors that are kept, and that are computed at each turn."""
    monkeypatch.setattr(refit, "MOST_KEPT", kept)
    model = AutoModelForCausalLM.from_pretrained(model_of("qwen3_moe", tmp_path / "model")).eval()
    block = model.model.layers[0].mlp
    experts, (x_TD, target_TD) = block.experts, torch.randn(2, 400, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, weight_TK, index_TK = block.gate(x_TD)
        found = down_changes(experts, block.gate, x_TD, target_TD, sweeps=300)
        gate_TEF, up_TEF = torch.einsum("td,egd->teg", x_TD, experts.gate_up_proj).chunk(2, dim=2)
        weight_TE = torch.zeros(len(x_TD), len(experts.down_proj)).scatter(1, index_TK, weight_TK)
        hidden_TEF = (torch.nn.functional.silu(gate_TEF) * up_TEF * weight_TE[..., None]).double().numpy()
        left_TD = (target_TD - experts(x_TD, index_TK, weight_TK)).double().numpy()
    ridge_EF = 0.01 * np.square(hidden_TEF).sum(0).mean(1, keepdims=True).repeat(hidden_TEF.shape[2], axis=1)
    flat = hidden_TEF.reshape(len(hidden_TEF), -1)
    expected = np.linalg.lstsq(
        np.concatenate([flat, np.diag(np.sqrt(ridge_EF.ravel()))]),
        np.concatenate([left_TD, np.zeros((flat.shape[1], 32))]),
        rcond=None,
    )[0]
    np.testing.assert_allclose(np.concatenate([found[each].numpy() for each in sorted(found)]), expected, atol=1e-4)
