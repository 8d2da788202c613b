"""Advice from pieces made by hand: dollars, settings and numbers of experts by hand, and refusals outside the range."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from grid_example import piece
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.study import __main__ as command_line
from benchmarks.study.compare.arms import ARMS, REFERENCE, planned
from benchmarks.study.grid import cells, command, files
from benchmarks.study.grid.advice import Advice, advise
from benchmarks.study.grid.records import Phase, PieceResult
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.errors import ConfigError

TOKENS = cells.SMOKE.tokens
RECIPE = {
    "tokens.seed_share": 0.8,
    "tokens.finetune_share": 0.05,
    "clusters.count": 4,
    "submodels.sync_every": 16,
    "submodels.optimizer.batch_tokens": cells.SMOKE.batch_tokens,
    "submodels.optimizer.lr": 1e-3,
    "finetune.optimizer.name": "muon",
}


def config(*, experts: int = 16, tokens: int = TOKENS, **changes: Any) -> RunConfig:
    own = cells.Cell(
        corpus="embedded", family="qwen3_moe", start="random", experts=experts, top_k=2, budget=1, scale="smoke"
    )
    raw = cells.base_config(own, 0, None, Path("runs")).model_dump(mode="json")
    raw["tokens"]["total"] = tokens
    return check_config(raw | changes)


PER_TOKEN = planned(config(), ARMS[REFERENCE]).stages[-1].cost.flops / TOKENS


def measured(arm: str, loss: float, *, low: float = 0.0, budget: int = 1, **changes: Any) -> PieceResult:
    """A piece with a share `low` of its operations on cheap cards."""
    flops = PER_TOKEN * TOKENS * budget
    phases = [
        Phase(pool="low_memory", flops=low * flops, workers=4.0),
        Phase(pool="high_memory", flops=(1 - low) * flops, workers=1.0),
    ]
    found = piece(arm, loss, phases=[each for each in phases if each.flops], budget=budget, **changes)
    return found if arm == REFERENCE else found.model_copy(update={"recipe": RECIPE})


def smaller(whole: PieceResult, factor: float) -> PieceResult:
    """The piece with operations divided by a factor."""
    phases = tuple(phase.model_copy(update={"flops": phase.flops / factor}) for phase in whole.phases)
    return whole.model_copy(update={"phases": phases})


def grid(gap: float = 0.1, growth: float = 0.0, **changes: Any) -> list[PieceResult]:
    """Two budgets of joint training (0.5 less loss per e-fold), of ours, and of a rival that is worse by 0.1."""
    return [
        each
        for budget in (1, 4)
        for each in (
            measured(REFERENCE, 4.0 - 0.5 * math.log(budget), budget=budget, **changes),
            measured(
                "disco",
                4.0 - 0.5 * math.log(budget) + gap + growth * math.log(budget),
                low=0.95,
                budget=budget,
                **changes,
            ),
            measured("upcycle", 4.1 - 0.5 * math.log(budget) + gap, low=0.95, budget=budget, **changes),
        )
    ]


@given(gap=st.floats(-0.1, 0.3), growth=st.floats(-0.05, 0.05), tokens=st.integers(TOKENS, 4 * TOKENS))
def test_dollars_are_those_of_the_tokens_that_close_the_interpolated_gap(
    gap: float, growth: float, tokens: int
) -> None:
    found = {each.arm: each for each in advise(config(tokens=tokens), grid(gap, growth)).options}
    price = 0.35 / 0.72 / 2.28
    own = gap + growth * math.log(tokens / TOKENS)
    assert found["disco"].gap == pytest.approx(own)
    assert found["disco"].dollars == pytest.approx((0.95 * price + 0.05) * math.exp(own / 0.5))
    assert (found[REFERENCE].dollars, found["joint-low"].dollars) == (pytest.approx(1.0), pytest.approx(price))
    assert found["upcycle"].gap == pytest.approx(gap + 0.1)


def test_an_arm_without_the_nearest_budget_is_priced_against_joint_training_on_its_own_tokens() -> None:
    pieces = grid(gap=0.0)
    few = [each for each in pieces if each.arm != "disco"]
    longer = [
        measured(REFERENCE, 4.0 - 0.5 * math.log(16), budget=16),
        measured("disco", 4.0 - 0.5 * math.log(16), low=0.95, budget=16),
    ]
    ours = [each for each in pieces if each.arm == "disco" and each.cell.budget == 1]
    found = {each.arm: each for each in advise(config(tokens=4 * TOKENS), [*few, *longer, *ours]).options}
    assert found["disco"].dollars == pytest.approx(0.95 * 0.35 / 0.72 / 2.28 + 0.05)


def test_the_cheapest_option_is_first_and_has_its_measured_settings() -> None:
    cheap = grid(gap=-0.1)
    advice = advise(config(), cheap)
    assert [each.arm for each in advice.options] == ["disco", "joint-low", "upcycle", REFERENCE]
    assert advice.options[0].settings == {
        "tokens.seed_share": 0.8,
        "tokens.finetune_share": 0.05,
        "submodels.sync_every": 16,
        "submodels.optimizer.batch_tokens": cells.SMOKE.batch_tokens,
        "finetune.optimizer.name": "muon",
        "clusters.count": 4,
        "finetune.pool": "high_memory",
    }
    assert not advice.options[0].tuned
    assert advice.options[1].settings == {"finetune.pool": "low_memory"}
    # Between 16 and 32 experts, sub-models keep four experts each.
    both = [*cheap, *grid(gap=-0.1, experts=32)]
    assert advise(config(experts=24), both).options[0].settings["clusters.count"] in (3, 6)


def test_the_half_size_model_is_advised_with_its_number_of_experts() -> None:
    half = [
        each.model_copy(update={"arm": "half", "loss": each.loss + 0.01})
        for each in grid(gap=0.0)
        if each.arm == REFERENCE
    ]
    found = {each.arm: each for each in advise(config(), [*grid(gap=0.0), *half]).options}
    assert found["half"].settings["model.config.num_experts"] == 8
    assert found["half"].settings["finetune.pool"] == "low_memory"
    assert "model.config.num_experts" not in found["joint-low"].settings


def test_numbers_of_experts_are_compared_at_one_loss_and_with_serving() -> None:
    worse = [each.model_copy(update={"loss": each.loss + 0.25}) for each in grid(experts=8)]
    dense = [smaller(each, 2) for each in worse]
    pieces = [*grid(), *dense]
    price = 0.35 / 0.72 / 2.28
    training = advise(config(), pieces).shapes
    assert [(each.experts, each.arm) for each in training] == [(8, "joint-low"), (16, "joint-low")]
    assert [each.dollars for each in training] == [
        pytest.approx(price * math.exp(0.25 / 0.5) / 2),
        pytest.approx(price),
    ]
    served = advise(config(), pieces, serving_tokens=30 * TOKENS).shapes
    assert [each.dollars for each in served] == [
        pytest.approx(training[0].dollars + 5),
        pytest.approx(training[1].dollars + 10),
    ]


@pytest.mark.parametrize(
    ("changes", "pieces", "message"),
    [
        ({}, [], "model.family: 'qwen3_moe': was not measured with the start 'random'"),
        ({}, grid()[:3], "tokens.total: .* needs the slope of joint training's loss, .* measured at 5,120 tokens only"),
        ({"tokens": TOKENS - 1}, grid(), "tokens.total: .* is outside what was measured: 5,120 to 20,480 tokens"),
        ({"tokens": 4 * TOKENS + 1}, grid(), "tokens.total: .* is outside what was measured"),
        (
            {"experts": 8},
            grid(),
            "model.config.num_experts: 8: makes 0.25 of the experts active; measured is 0.125 to 0.125",
        ),
        (
            {},
            [*grid()[:3], *(each.model_copy(update={"loss": 9.0}) for each in grid()[3:])],
            "tokens.total: .* needs the slope",
        ),
        (
            {},
            [*grid()[:3], *(each.model_copy(update={"seed": 1}) for each in grid()[3:])],
            "measured at no tokens only",
        ),
    ],
    ids=["nothing", "one budget", "fewer", "more", "share", "no slope", "no common seed"],
)
def test_outside_the_range_nothing_is_recommended(
    changes: dict[str, Any], pieces: Sequence[PieceResult], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        advise(config(**changes), pieces)


def test_a_model_of_another_size_gets_no_advice() -> None:
    tiny = [smaller(each, 3) for each in grid()]
    with pytest.raises(ConfigError, match=r"model: .*operations per token in training; measured are models with"):
        advise(config(), tiny)


def test_advice_comes_from_models_of_the_size_and_then_from_text_that_was_measured_at_the_tokens() -> None:
    def times(each: PieceResult, factor: float, **cell: Any) -> PieceResult:
        phases = tuple(phase.model_copy(update={"flops": factor * phase.flops}) for phase in each.phases)
        return each.model_copy(update={"phases": phases, "cell": each.cell.model_copy(update=cell)})

    small = [
        times(each, 0.4, corpus="small").model_copy(update={"seed": seed})
        for each in grid(gap=0.3)
        for seed in range(3)
    ]
    longer = [times(each, 4.0, corpus="longer", budget=4 * each.cell.budget) for each in grid(gap=0.2)]
    pieces = [*small, *longer, *grid(), *(each.model_copy(update={"seed": 1}) for each in grid())]

    def gap(tokens: int) -> float:
        return next(each.gap for each in advise(config(tokens=tokens), pieces).options if each.arm == "disco")

    assert gap(TOKENS) == pytest.approx(0.1)
    assert gap(16 * TOKENS) == pytest.approx(0.2)
    assert gap(4 * TOKENS) == pytest.approx(0.1)


def test_an_arm_with_one_budget_is_left_out() -> None:
    assert [each.arm for each in advise(config(), [*grid()[:3], *grid()[3:5]]).options] == [
        "joint-low",
        "disco",
        REFERENCE,
    ]


def test_every_published_setting_can_be_compared_with_a_configuration() -> None:
    for each in files.published(files.PUBLISHED):
        changes = list(command._changes(config(), each.settings))
        assert len(changes) < len(each.settings)


def test_a_setting_that_was_removed_since_a_piece_was_measured_is_no_advice() -> None:
    gone = {"clusters.method": "kmeans", "clusters.restarts": 2, "finetune.exchange": "auto"}
    old = [
        each.model_copy(update={"recipe": {**each.recipe, **gone}}) if each.recipe else each for each in grid(gap=-0.1)
    ]
    assert old != grid(gap=-0.1)
    assert advise(config(), old) == advise(config(), grid(gap=-0.1))


def test_the_command_prints_options_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(config().model_dump_json(), encoding="utf-8")
    monkeypatch.setattr(command, "published", lambda _: grid(gap=-0.1))

    def invoke(*options: str) -> str:
        return CliRunner().invoke(command_line.app, ["advise", str(path), *options], prog_name="study").output

    shown = " ".join(invoke("--serving-tokens", "1e9").split())
    assert "ours: submodels.sync_every=16 clusters.count=4 joint on" in shown  # the rest is configured so
    assert "joint on the cheap pool: finetune.pool=low_memory" in shown
    assert "One number of experts is measured at these tokens, so none is recommended." in shown
    assert Advice.model_validate(json.loads(invoke("--json"))).options[0].arm == "disco"
    assert "tokens.total" in invoke("--set", "tokens.total=51200")
