"""Experts of a dense start that are no mere copies of its MLP.

Shapes: F expert hidden, N new units, X weights of a unit in one matrix.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import LENGTH, random_tensors, tiny_config
from test_upcycle import dense, model_of

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import ModelMap, Role, open_checkpoint, write_checkpoint
from moedisco_ray.stages.decompose import write_common_start, write_untrained_submodels
from moedisco_ray.stages.start import Start, untrained_moe, whole_moe

HIDDEN = 160
STARTS = [("mixtral", "llama"), ("qwen2_moe", "qwen2"), ("granitemoe", "granitemoe"), ("gpt_oss", "gpt_oss")]
"""Families with an expert in three tensors, with a shared expert, and with two kinds of stacks; and what they start from."""


def start_of(directory: Path, family: str, kind: str, seed: int = 0, **init: Any) -> Start:
    """A start from a dense model, or from a model with one expert, whose weights have another mean than zero."""
    if not directory.exists() and kind != family:
        dense(directory, kind, intermediate_size=HIDDEN)
    if not directory.exists():
        config = tiny_config(family, 1, moe_intermediate_size=HIDDEN)
        write_checkpoint(directory, ((key, tensor + 1) for key, tensor in random_tensors(config).items()), config)
    return Start(model_of(family, directory, **init), Path("no-tokenizer"), LENGTH, seed)


def matrices(family: str, tensors: dict[str, torch.Tensor], layer: int, expert: int) -> dict[str, torch.Tensor]:
    """Gate, up and down projection of an expert, and biases of the first two, hidden units first."""
    if not DECLARATIONS[family].stacks:
        gate, up, down = (tensors[ModelMap(family).expert_key(layer, expert, part)] for part in ("gate", "up", "down"))
        return {"gate": gate, "up": up, "down": down.T}
    block = f"model.layers.{layer}.{DECLARATIONS[family].block}"
    if family == "granitemoe":
        both, down = (tensors[f"{block}.{name}_linear.weight"][expert] for name in ("input", "output"))
        return {"gate": both[:len(both) // 2], "up": both[len(both) // 2:], "down": down.T}
    both, bias = (tensors[f"{block}.experts.gate_up_proj{end}"][expert] for end in ("", "_bias"))
    return {
        "gate": both[:, ::2].T, "up": both[:, 1::2].T, "down": tensors[f"{block}.experts.down_proj"][expert],
        "gate bias": bias[::2, None], "up bias": bias[1::2, None]}


@pytest.mark.parametrize(("family", "kind"), STARTS)
def test_a_share_of_each_experts_units_is_new_and_the_rest_a_copy(tmp_path: Path, family: str, kind: str) -> None:
    old, new, same = (
        dict(whole_moe(start_of(tmp_path / "start", family, kind, reinitialise=share), None)[0]) for share in (0.0, 0.3, 0.3))
    assert all(torch.equal(tensor, same[key]) for key, tensor in new.items()), "the same seed gives the same bits"
    drawn = []
    for layer in range(2):
        for expert in range(4):
            before, after = (matrices(family, tensors, layer, expert) for tensors in (old, new))
            changed = {name: (before[name] != after[name]).any(dim=1) for name in before}
            drawn.append(changed["gate"])
            assert changed["gate"].sum() == round(0.3 * HIDDEN)
            for name, new_F in changed.items():
                assert torch.equal(new_F, changed["gate"]), "an expert's matrices have the same new units"
                was_NX, is_NX = before[name][new_F], after[name][new_F]
                assert (was_NX != is_NX).all()
                deviation, error = float(was_NX.std()), 5 / was_NX.numel() ** 0.5      # five standard errors
                assert float(is_NX.mean()) == pytest.approx(float(was_NX.mean()), abs=error * deviation)
                assert float(is_NX.std()) == pytest.approx(deviation, rel=error / 2 ** 0.5)
    assert len({tuple(new_F.tolist()) for new_F in drawn}) == len(drawn), "each expert of each layer has units of its own"
    names = ModelMap(family)
    for key, tensor in new.items():
        assert names.classify(key).role is Role.EXPERT or torch.equal(tensor, old[key]), key
    other = whole_moe(start_of(tmp_path / "start", family, kind, seed=1, reinitialise=0.3), None)[0]
    assert not torch.equal(matrices(family, dict(other), 0, 0)["up"], matrices(family, new, 0, 0)["up"])


def test_the_output_bias_of_an_expert_belongs_to_no_unit(tmp_path: Path) -> None:
    old, new = (
        whole_moe(start_of(tmp_path / "start", "gpt_oss", "gpt_oss", reinitialise=share), None)[0] for share in (0.0, 1.0))
    assert all(torch.equal(old[key], new[key]) for key in old if key.endswith("down_proj_bias"))


def test_a_seed_trains_the_dense_model_and_units_are_new_after_it(tmp_path: Path) -> None:
    start = start_of(tmp_path / "start", "mixtral", "llama", reinitialise=0.5)
    write_common_start(start, clusters=4, directory=tmp_path / "seed")
    untrained, whole = untrained_moe(start)[0], whole_moe(start, None)[0]
    seed, names = open_checkpoint(tmp_path / "seed"), ModelMap("mixtral")
    write_untrained_submodels(start, clusters=4, trained_seed=tmp_path / "seed", directory=tmp_path / "parts")
    for k in range(4):
        part = open_checkpoint(tmp_path / "parts" / str(k))
        for name in ("gate", "up", "down"):
            own, first = names.expert_key(1, k, name), names.expert_key(1, 0, name)
            assert torch.equal(seed[first], untrained[own])
            assert torch.equal(part[first], whole[own])
            assert not torch.equal(part[first], seed[first])


@pytest.mark.parametrize(("init", "line"), [
    ({"reinitialise": 1.5}, "model.init.reinitialise: 1.5: must be at most 1"),
    ({"reinitialise": "half"}, "model.init.reinitialise: 'half': must be a number"),
])
def test_mistakes_name_the_setting(init: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, "model": {"init": {"upcycle": "x", **init}}})
    assert str(caught.value).startswith(line)
