"""Experts of a dense start that are no mere copies of its MLP.

Shapes: F expert hidden, N new units, X weights of a unit in one matrix.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_models import LENGTH, UPCYCLED, VOCAB, random_tensors, tiny_config
from small_run import small_config
from test_upcycle import IDS, RELATIVES, dense, logits, model_of, upcycled
from transformers import AutoModelForCausalLM

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import ModelMap, Role, check_start_tensors, open_checkpoint, write_checkpoint
from moedisco_ray.plan import with_cluster_count
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.stages.decompose import write_common_start, write_untrained_submodels
from moedisco_ray.stages.start import Start, untrained_moe, whole_moe

HIDDEN = 160
STARTS = [("mixtral", "llama"), ("qwen2_moe", "qwen2"), ("granitemoe", "granite"), ("gpt_oss", "gpt_oss")]
"""Families with an expert in three tensors, with a shared expert, and with two kinds of stacks; and what they start
from."""


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
        return {"gate": both[: len(both) // 2], "up": both[len(both) // 2 :], "down": down.T}
    both, bias = (tensors[f"{block}.experts.gate_up_proj{end}"][expert] for end in ("", "_bias"))
    return {
        "gate": both[:, ::2].T,
        "up": both[:, 1::2].T,
        "down": tensors[f"{block}.experts.down_proj"][expert],
        "gate bias": bias[::2, None],
        "up bias": bias[1::2, None],
    }


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("family", "kind"), STARTS)
def test_a_share_of_each_experts_units_is_new_and_the_rest_a_copy(
    tmp_path: Path, family: str, kind: str, split: int
) -> None:
    old, new, same = (
        dict(whole_moe(start_of(tmp_path / "start", family, kind, reinitialise=share, split=split), None)[0])
        for share in (0.0, 0.3, 0.3)
    )
    assert all(torch.equal(tensor, same[key]) for key, tensor in new.items()), "the same seed gives the same bits"
    drawn = []
    for layer in range(2):
        for expert in range(4):
            before, after = (matrices(family, tensors, layer, expert) for tensors in (old, new))
            changed = {name: (before[name] != after[name]).any(dim=1) for name in before}
            drawn.append(changed["gate"])
            assert (len(changed["gate"]), int(changed["gate"].sum())) == (HIDDEN // split, round(0.3 * HIDDEN / split))
            for name, new_F in changed.items():
                assert torch.equal(new_F, changed["gate"]), "an expert's matrices have the same new units"
                was_NX, is_NX = before[name][new_F], after[name][new_F]
                assert (was_NX != is_NX).all()
                deviation, error = float(was_NX.std()), 5 / was_NX.numel() ** 0.5  # five standard errors
                assert float(is_NX.mean()) == pytest.approx(float(was_NX.mean()), abs=error * deviation)
                assert float(is_NX.std()) == pytest.approx(deviation, rel=error / 2**0.5)
    assert len({tuple(new_F.tolist()) for new_F in drawn}) == len(drawn), (
        "each expert of each layer has units of its own"
    )
    names = ModelMap(family)
    for key, tensor in new.items():
        assert names.classify(key).role is Role.EXPERT or torch.equal(tensor, old[key]), key
    other = whole_moe(start_of(tmp_path / "start", family, kind, seed=1, reinitialise=0.3, split=split), None)[0]
    assert not torch.equal(matrices(family, dict(other), 0, 0)["up"], matrices(family, new, 0, 0)["up"])


def test_the_output_bias_of_an_expert_belongs_to_no_unit(tmp_path: Path) -> None:
    old, new = (
        whole_moe(start_of(tmp_path / "start", "gpt_oss", "gpt_oss", reinitialise=share), None)[0]
        for share in (0.0, 1.0)
    )
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


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 4, "split": 2, "num_experts_per_tok": 2},
        {"num_experts": 6, "split": 3, "num_experts_per_tok": 6},
    ],
)
@pytest.mark.parametrize(("family", "kind"), RELATIVES)
def test_the_parts_of_an_mlp_compute_what_it_did(tmp_path: Path, family: str, kind: str, sizes: dict[str, int]) -> None:
    start = dense(tmp_path / "dense", kind)
    check_start_tensors(model_of(family, start, **sizes))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(start)(IDS).logits
    whole = upcycled(tmp_path / "moe", family, start, **sizes)
    torch.testing.assert_close(logits(whole), expected, rtol=1e-4, atol=1e-5)
    planned, counts = (
        count_parameters(family, model_of(family, start, **sizes).architecture, VOCAB),
        dict.fromkeys(Role, 0),
    )
    for key, tensor in open_checkpoint(whole).items():
        counts[ModelMap(family).classify(key).role] += tensor.numel()
    assert (planned.experts, planned.shared_expert) == (counts[Role.EXPERT], counts[Role.SHARED_EXPERT])


@pytest.mark.parametrize("family", UPCYCLED)
def test_the_parts_of_a_single_expert_compute_what_it_did(tmp_path: Path, family: str) -> None:
    config = tiny_config(family, 1, moe_intermediate_size=16)
    write_checkpoint(tmp_path / "seed", random_tensors(config).items(), config)
    selected = 4 if DECLARATIONS[family].router.normalises == "never" else 2
    whole = upcycled(tmp_path / "moe", family, tmp_path / "seed", split=2, num_experts_per_tok=selected)
    torch.testing.assert_close(logits(whole), logits(tmp_path / "seed"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), STARTS)
def test_the_experts_of_a_group_hold_the_units_in_order(tmp_path: Path, family: str, kind: str) -> None:
    copies, parts = (
        dict(untrained_moe(start_of(tmp_path / "start", family, kind, split=split, num_experts_per_tok=1))[0])
        for split in (1, 2)
    )
    for layer in range(2):
        whole = matrices(family, copies, layer, 0)
        found = [matrices(family, parts, layer, e) for e in range(4)]
        for name, units_FX in whole.items():
            group = torch.cat([found[0][name], found[1][name]])
            assert torch.equal(group, units_FX * 2 if name == "down" else units_FX)
            assert torch.equal(group, torch.cat([found[2][name], found[3][name]])), "a further group is a copy"
        rows = parts[ModelMap(family).router_key(layer)]
        assert len(rows.unique(dim=0)) == 4, "experts that are selected one by one need rows of their own"


def test_a_seed_and_the_sub_models_hold_whole_groups(tmp_path: Path) -> None:
    start = start_of(tmp_path / "start", "qwen2_moe", "qwen2", split=2)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "start")(IDS).logits
    write_common_start(start, clusters=2, directory=tmp_path / "seed")
    write_untrained_submodels(start, clusters=2, trained_seed=tmp_path / "seed", directory=tmp_path / "parts")
    for directory in (tmp_path / "seed", tmp_path / "parts" / "0", tmp_path / "parts" / "1"):
        torch.testing.assert_close(logits(directory), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("experts", "split", "count"), [(4, 1, 2), (4, 2, 2), (6, 1, 2), (6, 2, 3)])
def test_the_decided_number_of_sub_models_cuts_no_group(tmp_path: Path, experts: int, split: int, count: int) -> None:
    start = dense(tmp_path / "dense", "llama", vocab_size=600)
    config = small_config(
        tmp_path,
        clusters={"count": "auto"},
        pools={"low_memory": {"max_workers": 4}},
        model={
            "family": "mixtral",
            "config": None,
            "init": {"upcycle": str(start), "num_experts": experts, "num_experts_per_tok": 1, "split": split},
        },
    )
    assert with_cluster_count(config).cluster_count == count


@pytest.mark.parametrize(
    ("init", "clusters", "line"),
    [
        (
            {"split": 5, "num_experts": 5},
            1,
            (
                r"model\.init\.split: 5: does not divide the MLP's 24 hidden units into experts of 8 or more; "
                "use a divisor of 24"
            ),
        ),
        (
            {"split": 4, "num_experts": 4},
            1,
            r"model\.init\.split: 4: does not divide the MLP's 24 hidden units into experts of 8",
        ),
        (
            {"split": 2, "num_experts": 4},
            4,
            r"clusters\.count: 4 does not divide the model's 2 groups of model\.init\.split 2 experts; use one of 1, 2",
        ),
    ],
)
def test_a_split_that_does_not_fit_is_one_line(tmp_path: Path, init: dict[str, int], clusters: int, line: str) -> None:
    start = dense(tmp_path / "dense", "llama")
    with pytest.raises((CheckpointError, ConfigError), match=line):
        small_config(
            tmp_path,
            clusters={"count": clusters},
            model={"family": "mixtral", "config": None, "init": {"upcycle": str(start), **init}},
        )


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ({"split": 3}, "model.init: split 3 does not divide num_experts 4; set num_experts to a multiple of 3"),
        ({"split": 0}, "model.init.split: 0: must be at least 1"),
        ({"reinitialise": 1.5}, "model.init.reinitialise: 1.5: must be at most 1"),
        ({"reinitialise": "half"}, "model.init.reinitialise: 'half': must be a number"),
    ],
)
def test_mistakes_name_the_setting(init: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(
            {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}, "model": {"init": {"upcycle": "x", **init}}}
        )
    assert str(caught.value).startswith(line)
