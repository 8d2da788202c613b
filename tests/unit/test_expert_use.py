"""A trained MoE's experts go to the sub-model whose cluster selects them, and the merge puts them back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import LENGTH, VOCAB, model_map, moe, random_tensors, tiny_config

from moedisco_ray.core.config import RunConfig, derived
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.cut import DecomposeSummary, StartLoss
from moedisco_ray.core.stages import fingerprints, stage_named
from moedisco_ray.models import check_same, differences, expert_count, open_checkpoint, write_checkpoint
from moedisco_ray.models.expert_order import Reordered, inverted, reordered_by_layer
from moedisco_ray.models.optimizer_state import OPTIMIZER_FOLDER, open_optimizer_state, write_optimizer_state
from moedisco_ray.plan import build_plan
from moedisco_ray.stages.decompose import check_losses, decompose, write_submodels
from moedisco_ray.stages.expert_use import assigned, own_share, selections, window_nats
from moedisco_ray.stages.merge.build import build_merged
from moedisco_ray.stages.merge.calibrate import RouterSettings
from moedisco_ray.stages.merge.optimizer_state import merge_optimizer_states

CLUSTERS = 2
BATCHES = [(np.arange(2 * LENGTH).reshape(2, LENGTH) % VOCAB, np.array([0, 1]))]


@st.composite
def counts(draw: st.DrawFn) -> np.ndarray[Any, np.dtype[np.int64]]:
    clusters, group = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cells = st.lists(st.integers(0, 50), min_size=clusters * group, max_size=clusters * group)
    return np.array(draw(st.lists(cells, min_size=clusters, max_size=clusters)), dtype=np.int64)


@settings(max_examples=200, deadline=None)
@given(counts())
def test_each_cluster_gets_as_many_experts_and_no_smaller_share_than_by_index(
    counts_CE: np.ndarray[Any, np.dtype[np.int64]],
) -> None:
    clusters, experts = counts_CE.shape
    found_E = assigned(counts_CE)
    assert sorted(found_E) == list(range(experts))
    for own in found_E.reshape(clusters, -1):
        assert list(own) == sorted(own)
    assert own_share(counts_CE, found_E) >= own_share(counts_CE, np.arange(experts)) - 1e-12


@settings(max_examples=50, deadline=None)
@given(counts())
def test_where_all_choices_are_equal_groups_stay_those_by_index(counts_CE: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    same_CE = np.repeat(counts_CE[:1], len(counts_CE), axis=0)
    assert list(assigned(same_CE)) == list(range(counts_CE.shape[1]))


def test_a_cluster_with_more_text_does_not_win() -> None:
    counts_CE = np.array([[600, 500, 0, 0], [9, 0, 0, 1]])
    assert list(assigned(counts_CE)) == [1, 2, 0, 3]
    assert own_share(counts_CE, np.array([1, 2, 0, 3])) == pytest.approx((5 / 11 + 1) / 2)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss"])
def test_experts_that_serve_a_domain_are_grouped(family: str) -> None:
    """Experts 0 and 2 serve the first half of the vocabulary, and 1 and 3 the second."""
    config = tiny_config(family, 4)
    names = model_map(config)
    tensors = {key: 0.01 * tensor for key, tensor in random_tensors(config).items()}
    sign_V = torch.where(torch.arange(VOCAB) < VOCAB // 2, 1.0, -1.0)
    tensors["model.embed_tokens.weight"][:, 0] = 10 * sign_V
    for key, tensor in tensors.items():
        if "norm" in key:
            tensor.fill_(1)
    for layer in range(2):
        tensors[names.router_key(layer)][:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    numbers = np.random.default_rng(0)
    windows = [numbers.integers(k * VOCAB // 2, (k + 1) * VOCAB // 2, size=(3, LENGTH)) for k in range(2)]
    batches = [(tokens_BL, np.full(3, k)) for k, tokens_BL in enumerate(windows)]
    found, nats_N = selections(tensors, config, batches, 2, prefix=0, sequence_length=LENGTH)
    assert list(nats_N) == list(window_nats(tensors, config, batches, prefix=0, sequence_length=LENGTH))
    for counts_CE in found.selections_RGE:
        assert counts_CE.sum() == 2 * 2 * 3 * LENGTH
        assert list(assigned(counts_CE)) == [0, 2, 1, 3]
        # the token before each window is of the first half
        assert own_share(counts_CE, assigned(counts_CE)) == pytest.approx((1 + 1 - 1 / LENGTH) / 2)
        assert own_share(counts_CE, np.arange(4)) == pytest.approx(0.5)


def order_of(config: dict[str, Any], clusters: int, seed: int = 0) -> dict[int, list[int]]:
    """Another random order in every MoE layer, in which each group is sorted."""
    numbers, experts = np.random.default_rng(seed), expert_count(config)
    return {
        layer: np.sort(numbers.permutation(experts).reshape(clusters, -1)).ravel().tolist()
        for layer in model_map(config).experts(random_tensors(config))
    }


@settings(max_examples=60, deadline=None)
@given(moe(), st.integers(0, 1000))
def test_a_submodel_has_the_experts_of_the_order_and_their_router_rows(
    case: tuple[dict[str, Any], dict[str, torch.Tensor], int], seed: int
) -> None:
    config, tensors, clusters = case
    names, count, order = model_map(config), expert_count(config), order_of(case[0], clusters, seed)
    check_same(Reordered(Reordered(tensors, names, order), names, inverted(order)), tensors)
    again = reordered_by_layer(Reordered(tensors, names, order).items(), names, inverted(order), tensors)
    check_same(dict(again), tensors)
    for k in range(clusters):
        found = dict(decompose(tensors, names, count, clusters, k, order=order))
        check_same(found, dict(decompose(Reordered(tensors, names, order), names, count, clusters, k)))


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "granitemoe"])
def test_submodels_that_learnt_nothing_become_the_start_again(family: str, tmp_path: Path) -> None:
    """Of families with a tensor per expert, with stacks, and with biases that correct the selection."""
    config = tiny_config(family, 4)
    tensors, order = random_tensors(config), order_of(config, CLUSTERS)
    write_checkpoint(tmp_path / "whole", tensors.items(), config)
    whole = open_checkpoint(tmp_path / "whole")
    write_submodels(whole, whole.config, CLUSTERS, tmp_path / "parts", order=order)
    parts = [tmp_path / "parts" / str(k) for k in range(CLUSTERS)]
    first = dict(open_checkpoint(parts[0]))
    assert differences(first, dict(decompose(tensors, model_map(config), 4, CLUSTERS, 0))), "groups are not by index"
    for number, part in enumerate(parts):
        write_optimizer_state(
            part / OPTIMIZER_FOLDER,
            lambda _, number=number: decompose(
                tensors, model_map(config), 4, CLUSTERS, number, order=order
            ),  # stands for a state that differs by expert
            1,
            open_checkpoint(part).config,
        )
    result = build_merged(
        parts,
        tmp_path / "parts" / "backbone",
        whole.config,
        [0.5, 0.5],
        BATCHES,
        directory=tmp_path / "merged",
        router=RouterSettings("kept", match_load=False, match_scale=False),
        order=order,
    )
    check_same(open_checkpoint(tmp_path / "merged"), whole)
    weights = [path.read_bytes() for path in sorted((tmp_path / "merged").glob("*.safetensors"))]
    assert weights == [path.read_bytes() for path in sorted((tmp_path / "whole").glob("*.safetensors"))]
    for entry in result["tensors"]:
        role = model_map(config).classify(entry["key"])
        if role.expert is not None:
            assert entry["submodels"] == [order[role.layer].index(role.expert) // 2], entry["key"]
    by_start, _ = selections(tensors, config, BATCHES, CLUSTERS, prefix=0, sequence_length=LENGTH)
    assert [entry["layer"] for entry in result["layers"]] == list(by_start.layers)
    assert merge_optimizer_states(parts, whole.config, [0.5, 0.5], tmp_path / "merged", order)
    state = open_optimizer_state(tmp_path / "merged" / OPTIMIZER_FOLDER)
    assert state is not None
    check_same(dict(state.tensors["exp_avg"]), tensors)


def test_the_load_of_an_expert_is_reported_at_its_place(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", 4)
    tensors, order = random_tensors(config), {0: [1, 3, 0, 2], 1: [0, 1, 2, 3]}
    loads = []
    for name, places in (("by-use", order), ("by-index", None)):
        write_submodels(tensors, config, CLUSTERS, tmp_path / name, order=places)
        result = build_merged(
            [tmp_path / name / str(k) for k in range(CLUSTERS)],
            tmp_path / name / "backbone",
            config,
            [0.5, 0.5],
            BATCHES,
            directory=tmp_path / f"{name}-merged",
            router=RouterSettings("kept", match_load=False, match_scale=False),
            order=places,
        )
        loads.append([entry["load_E"] for entry in result["layers"]])
    assert loads[0] == loads[1]
    assert len(set(loads[0][0])) > 1


def config_of(family: str = "olmoe", fields: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "corpus": {"sources": [{"path": "embedded"}]},
            "tokens": {"seed_share": 0.0},
            "model": {
                "family": family,
                "init": {"checkpoint": "start"},
                "config": {"num_experts": 8, "num_experts_per_tok": 2, "fields": fields or {}},
            },
            "clusters": {"count": 4, "vectors": "tfidf_svd"},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("config", "by_use"),
    [
        (config_of(), True),
        (config_of(merge={"router": "kept"}), True),
        (config_of("deepseek_v2"), True),
        (config_of("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}), False),
        (config_of(merge={"router": "ridge"}), False),
        (config_of(clusters={"count": 1, "vectors": "tfidf_svd"}), False),
        (config_of(tokens={"seed_share": 0.0, "finetune_share": 1.0}), False),
        (config_of(model={"config": {"num_experts": 8}}), False),
    ],
)
def test_experts_are_grouped_by_use_where_the_start_s_routers_are_kept(config: RunConfig, by_use: bool) -> None:
    assert derived.experts_by_use(config) == by_use
    measured = derived.measures_cut(config)
    assert stage_named("decompose").place(config) == ("low_memory" if measured else "head")
    plan = build_plan(config)
    [planned] = [stage for stage in plan.estimates if stage.stage == "decompose"]
    [stored] = [stage for stage in plan.storage if stage.stage == "decompose"] or [None]
    assert planned.pool == ("low_memory" if measured else "head")
    assert [each.stage for each in plan.inference if each.stage == "decompose"] == ["decompose"] * measured
    assert stored is None or stored.pool == ("low_memory" if measured else "cpu")


def test_measuring_what_a_cut_loses_is_paid_for() -> None:
    """Both models read the sample: the MoE once, and each sub-model its share."""
    cards = {"low_memory": {"gpu": 1}, "high_memory": {"gpu": 1}}
    plans = [build_plan(config_of(merge={"calibration_tokens": count}, pools=cards)) for count in (16_384, 65_536)]
    few, many = (stage for plan in plans for stage in plan.estimates if stage.stage == "decompose")
    assert few.seconds is not None
    assert many.seconds is not None
    assert few.worker_seconds == few.seconds
    assert many.seconds > few.seconds


@pytest.mark.parametrize(
    ("lost", "most"), [((0.01, 0.06), 0.05), ((0.01, math.nan), 0.05), ((math.nan, 0.06), 1.0), ((0.0, 1e-9), 0.0)]
)
def test_a_submodel_that_loses_too_much_is_not_trained(lost: tuple[float, float], most: float) -> None:
    losses = [StartLoss(cluster=k, start=3.0, submodel=3.0 + each) for k, each in enumerate(lost)]
    check_losses(losses, None)
    check_losses([], most)
    with pytest.raises(
        ConfigError, match=rf"^submodels\.start_loss: {most}: sub-model [01] would begin with a loss of"
    ):
        check_losses(losses, most)


def test_a_submodel_that_loses_little_is_trained() -> None:
    check_losses([StartLoss(cluster=0, start=3.0, submodel=3.04), StartLoss(cluster=1, start=4.0, submodel=3.0)], 0.05)


def test_a_report_says_in_a_line_what_the_cut_loses() -> None:
    losses = [StartLoss(cluster=0, start=3.0, submodel=3.01), StartLoss(cluster=1, start=2.5, submodel=2.54)]
    assert DecomposeSummary().note is None
    assert DecomposeSummary(losses=losses).note == (
        "before their training, sub-models lose up to 0.040 nats per token more than the MoE on their own text "
        "(sub-model 1: 2.540, the MoE 2.500)"
    )
    found = DecomposeSummary(losses=losses, own_share=0.83, own_share_by_index=0.5).note
    assert str(found).endswith("; their experts take 83% of what their text selects in the MoE, 50% by index")


def test_a_run_of_an_earlier_version_keeps_its_submodels() -> None:
    """The fingerprint says how experts are grouped only where that is not the default."""

    def material(config: RunConfig) -> dict[str, Any]:
        return dict(stage_named("decompose").derived(config))

    assert material(config_of()) == {}
    assert material(config_of(merge={"calibration_tokens": 100_000})) == {}
    assert material(config_of(merge={"calibration_tokens": 1000})) == {"use_tokens": 1000}
    assert material(config_of(merge={"router": "ridge"})) == {"experts": "by index"}
    assert material(config_of(model={"config": {"num_experts": 8}}, merge={"router": "ridge"})) == {}
    before, after = fingerprints(config_of()), fingerprints(config_of(merge={"router": "ridge"}))
    assert before["cluster"] == after["cluster"]
    assert before["decompose"] != after["decompose"]
