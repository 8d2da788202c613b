"""Arms, accounts and a whole small comparison."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from small_run import DOMAINS, small_config

from benchmarks.study.compare.accounting import Reads, account, curve, dollars_of, first_reach, wall_hours
from benchmarks.study.compare.arms import ARMS, REFERENCE, Arm, arm_config, chosen, planned, predicted, tokens_for
from benchmarks.study.compare.figures import label_ends, plot_comparison
from benchmarks.study.compare.records import Comparison, PhaseCost, Point
from benchmarks.study.compare.run import compare
from benchmarks.study.compare.table import compare_view
from moedisco_ray.cli.figures import blank_figure
from moedisco_ray.core.config import Evaluation, RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.plan import build_plan

TOKENS = {"total": 24_000, "seed_share": 0.25, "finetune_share": 0.25}
READS: Reads = {"evaluate": {"whole": 3000}, "cluster": {"submodel": 60_000}, "merge": {"whole": 1536}}
"""Reads in another order than that of the stages."""


@pytest.fixture
def base(tmp_path: Path) -> RunConfig:
    return small(tmp_path)


def small(output: Path) -> RunConfig:
    return small_config(
        output,
        tokens=TOKENS,
        clusters={"count": 2, "vectors": "hidden_state"},
        evaluation={"max_tokens": 3000, "every_tokens": 4096},
        merge={"calibration_tokens": 1024},
    )


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_configuration_on_the_same_text(base: RunConfig, tmp_path: Path, name: str) -> None:
    config = arm_config(base, name, ARMS[name], tmp_path, "tokens", 24_000)
    assert (config.corpus, config.tokenizer, config.seed) == (base.corpus, base.tokenizer, base.seed)
    whole = base.model.architecture
    experts = max(whole.num_experts_per_tok, whole.num_experts // 2) if name == "half" else whole.num_experts
    assert config.model.architecture == whole.model_copy(update={"num_experts": experts})
    assert config.tokens.seed + config.tokens.submodels + config.tokens.finetune == 24_000
    assert config.tokens.decoupled == (name not in ("joint", "joint-low", "half", "upcycle", "expert-upcycling"))
    assert config.directory == tmp_path / f"{name}-tokens"
    # An ensemble always weights by tf-idf distances, for which its temperature is set, whatever the base configuration
    # clusters by.
    assert name != "ensemble" or config.clusters.vectors == "tfidf_svd"


def nothing(config: RunConfig, arm: Arm) -> Reads:
    return {}


def some(config: RunConfig, arm: Arm) -> Reads:
    """Cluster as many tokens as are trained on."""
    share = config.tokens.total / TOKENS["total"]
    reads: Reads = {**READS, "cluster": {"submodel": share * READS["cluster"]["submodel"]}}
    return {stage: tokens for stage, tokens in reads.items() if stage == "evaluate" or config.tokens.decoupled}


@pytest.mark.parametrize("reads", [nothing, some])
@pytest.mark.parametrize("name", ARMS)
def test_equal_dollars_are_equal_to_a_thousandth(base: RunConfig, tmp_path: Path, name: str, reads: Any) -> None:
    # Every phase trains whole batches: of this many tokens, one is less than a thousandth.
    base = base.model_copy(update={"tokens": base.tokens.model_copy(update={"total": 1000 * base.tokens.total})})
    tokens = tokens_for(base, ARMS[name], "dollars", reads)
    joint = arm_config(base, REFERENCE, ARMS[REFERENCE], tmp_path, "tokens", base.tokens.total)
    ours = arm_config(base, name, ARMS[name], tmp_path, "dollars", tokens)
    spent = [
        dollars_of(account(config, build_plan(config), reads(config, ARMS[arm])))
        for config, arm in ((joint, REFERENCE), (ours, name))
    ]
    assert spent[1] == pytest.approx(spent[0], rel=1e-3)
    if reads is nothing:
        assert build_plan(ours).training_dollars == pytest.approx(
            planned(base, ARMS[REFERENCE]).training_dollars, rel=1e-3
        )
    else:
        # Reading leaves fewer tokens to train on, unless joint training's reading costs the same or more.
        fewer = tokens < tokens_for(base, ARMS[name], "dollars", nothing)
        assert fewer == ours.tokens.decoupled
    assert tokens_for(base, ARMS[name], "tokens", reads) == base.tokens.total
    # A token on the cheap pool costs 0.35 / 2.28 / 0.72 of one on the expensive pool, for the same operations.
    if name == "joint-low" and reads is nothing:
        assert tokens / base.tokens.total == pytest.approx(2.28 * 0.72 / 0.35, rel=1e-3)


def test_an_arm_that_cannot_be_paid_for_is_one_line(base: RunConfig) -> None:
    def too_much(config: RunConfig, arm: Arm) -> Reads:
        return {"cluster": {"submodel": 1e7}} if config.tokens.decoupled else {}

    with pytest.raises(
        ConfigError, match=r"tokens.total: 24000: joint training on these tokens costs less than MoE-DisCo, as"
    ):
        tokens_for(base, ARMS["disco"], "dollars", too_much)
    free = base.model_copy(
        update={
            "pools": base.pools.model_copy(
                update={
                    kind: getattr(base.pools, kind).model_copy(update={"price_per_hour": 0.0})
                    for kind in ("low_memory", "high_memory")
                }
            )
        }
    )
    with pytest.raises(ConfigError, match="pools: an arm costs nothing"):
        tokens_for(free, ARMS["disco"], "dollars", nothing)


LINE = st.tuples(st.floats(2.0, 8.0), st.floats(0.05, 1.0))
TWO_RUNS = st.tuples(st.integers(10_000, 1_000_000), st.floats(1.5, 4.0))


@given(LINE, TWO_RUNS, st.floats(0.6, 8.0))
def test_runs_on_a_line_foretell_where_a_loss_is(
    line: tuple[float, float], runs: tuple[int, float], length: float
) -> None:
    top, slope = line
    few, many = runs[0], round(runs[0] * runs[1])
    sought = round(few * length)

    def loss(tokens: int) -> float:
        return top - slope * math.log(tokens / few)

    tokens = predicted([(many, loss(many)), (few, loss(few))], loss(sought))
    if sought > many:
        assert tokens is None
    elif tokens is None:
        assert min(abs(math.log(sought / few)), abs(math.log(sought / many))) < 0.011
    else:
        assert tokens == pytest.approx(sought, rel=1e-3)


def test_what_cannot_be_foretold() -> None:
    assert predicted([(100, 4.0)], 5.0) is None  # one run
    assert predicted([(100, 4.0), (200, 4.5)], 4.2) is None  # worse with more tokens
    assert predicted([(100, 4.0), (200, 3.5)], 9.0) == 50  # no shorter than half of the shortest
    assert predicted([(400, 3.0), (100, 5.0), (200, 4.0)], 3.5) == round(200 * 2**0.5)


def test_arms_that_there_are_not() -> None:
    assert list(chosen([])) == list(ARMS)
    assert list(chosen(["disco"])) == ["joint", "disco"]
    with pytest.raises(ConfigError, match=r"--arms: 'dense': no such arm; there are joint, "):
        chosen(["dense"])


def by_stage(phases: Iterable[PhaseCost]) -> dict[str, PhaseCost]:
    return {phase.stage: phase for phase in phases}


def point(tokens: int, loss: float, stage: str = "finetune") -> Point:
    return Point(
        stage=stage,
        tokens=tokens,
        dollars=tokens / 10,
        hours=tokens / 100,
        metered_dollars=tokens / 5,
        metered_hours=tokens / 50,
        loss=loss,
    )


HAND = [point(50, 3.0, "seed"), point(100, 6.0), point(200, 4.0), point(300, 4.5), point(400, 3.5)]


def test_a_loss_is_reached_between_two_looks() -> None:
    assert first_reach(HAND, 5.0, "tokens") == 150
    assert first_reach(HAND, 5.0, "dollars") == pytest.approx(15)
    assert first_reach(HAND, 4.0, "tokens") == 200
    assert first_reach(HAND, 3.75, "tokens") == 375  # the first time, and never the seed's
    assert first_reach(HAND, 7.0, "tokens") == 100
    assert first_reach(HAND, 3.4, "tokens") is None
    assert first_reach([], 3.4, "tokens") is None


def test_accounts_of_a_run_that_was_interrupted(base: RunConfig) -> None:
    plan = build_plan(base)
    seed, submodels, finetune = plan.stages
    phases = account(base, plan, READS)
    assert [phase.stage for phase in phases] == ["seed", "cluster", "submodels", "merge", "finetune", "evaluate"]
    _, cluster, _, merge, _, _ = phases

    def look(time: float, tokens: int, loss: float, stage: str = "finetune") -> Event:
        return Event("evaluation", stage, stage, {"step": 1, "tokens": tokens, "held_out_loss": loss}, time)

    events = [
        Event("run_started", time=0.0),
        Event("workers_held", data={"hold": "a", "pool": "low_memory", "workers": 2}, time=100.0),
        look(300.0, 1000, 6.0, "seed"),
        Event("workers_released", data={"hold": "a"}, time=400.0),
        Event("workers_held", data={"hold": "b", "pool": "high_memory", "workers": 1}, time=400.0),
        look(500.0, 1000, 5.0),
        look(600.0, 2000, 4.0),
        Event("run_stopped", time=700.0),
        Event("run_started", time=10_000.0),
        Event("workers_held", data={"hold": "c", "pool": "high_memory", "workers": 1}, time=10_000.0),
        look(10_100.0, 2000, 4.5),  # made again from the checkpoint after 1,000
        Event("run_finished", time=10_200.0),
    ]
    of_seed, first, second = curve(events, phases, base)
    low, high = base.pools.low_memory.price_per_hour, base.pools.high_memory.price_per_hour
    # Nothing was read before the seed.
    assert (of_seed.tokens, of_seed.dollars) == (1000, pytest.approx(seed.cost.dollars * 1000 / seed.cost.tokens))
    before = seed.cost.tokens + submodels.cost.tokens
    assert (first.tokens, second.tokens, second.loss) == (before + 1000, before + 2000, 4.5)
    spent = seed.cost.dollars + cluster.dollars + submodels.cost.dollars + merge.dollars
    assert first.dollars == pytest.approx(spent + finetune.cost.dollars * 1000 / finetune.cost.tokens)
    assert first.metered_dollars == pytest.approx(600 / 3600 * low + 100 / 3600 * high)
    assert second.metered_dollars == pytest.approx(600 / 3600 * low + (300 + 100) / 3600 * high)
    assert first.metered_hours == pytest.approx(500 / 3600)
    assert second.metered_hours == pytest.approx(800 / 3600)  # 700 of the first attempt, 100 of the second
    assert wall_hours(events) == pytest.approx(900 / 3600)
    assert [phase.stage for phase in account(base, plan, {})] == ["seed", "submodels", "finetune"]


def test_labels_of_curves_that_end_at_one_height_do_not_overlap() -> None:
    axes = blank_figure(6, 4).subplots()
    axes.plot([0, 1], [8.0, 4.0])
    label_ends(axes, [(1.0, 4.0, f"arm {number}", "black") for number in range(5)])
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 5
    assert all(right - left >= 0.06 - 1e-9 for left, right in pairwise(heights))


@dataclasses.dataclass(frozen=True)
class Compared:
    base: RunConfig
    output: Path
    result: Comparison


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two arms and joint training, measured on other text too."""
    output, before = tmp_path_factory.mktemp("compared"), torch.get_num_threads()
    base = small(output / "base")
    other = {"path": f"{Path(json.__file__).parent}/*.py", "documents": "paragraph", "format": "text"}
    base = base.model_copy(
        update={"evaluation": Evaluation.model_validate({**base.evaluation.model_dump(), "sources": [other]})}
    )
    torch.set_num_threads(1)
    try:
        result = compare(
            base, output / "compared", ["upcycle", "ensemble"], budgets=("tokens",), backend=LocalBackend()
        )
    finally:
        torch.set_num_threads(before)
    return Compared(base, output / "compared", result)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_small_comparison_and_its_resumption(compared: Compared, tmp_path: Path) -> None:
    base, output, result = compared.base, compared.output, compared.result
    assert [row.run for row in result.rows] == ["joint-tokens", "upcycle-tokens", "ensemble-tokens"]
    assert Comparison.model_validate(read_json(output / "compare.json")) == result
    joint, upcycle, ensemble = result.rows
    assert joint.recipe["tokens.finetune_share"] == 1
    assert [row.measured for row in result.rows] == ["finetune", "finetune", "ensemble"]
    assert joint.curve[-1].loss == pytest.approx(joint.loss, rel=1e-5)  # the same documents, in the same windows
    assert joint.dollars_to_target == pytest.approx(joint.curve[-1].dollars)
    assert {entry.stage for entry in upcycle.curve} == {"seed", "finetune"}
    assert ensemble.loss == ensemble.curve[-1].loss != joint.loss
    compared = f"{upcycle.perplexity:.2f} against {joint.perplexity:.2f} of joint training"
    measured = f"held-out perplexity: {compared}, at equal tokens ("
    assert measured in read_json(output / "upcycle-tokens" / "report.json")["bill"]["verdict"]
    # One corpus: the other runs have hard links to the first run's files.
    inodes = {(output / row.run / "corpus" / "shards" / "part-00000.npy").stat().st_ino for row in result.rows}
    assert len(inodes) == 1
    console = Console(width=180, record=True)
    console.print(compare_view(result))
    text = console.export_text()
    assert "sparse upcycling" in text
    assert "At equal tokens" in text
    assert "At equal planned dollars" not in text
    assert len(plot_comparison(result, tmp_path / "figures")) == 3
    phases = {row.arm: by_stage(row.phases) for row in result.rows}
    assert phases["joint"].keys() == {"finetune", "evaluate"}
    assert phases["upcycle"].keys() == {"seed", "merge", "finetune", "evaluate"}
    assert phases["ensemble"].keys() == {"seed", "cluster", "submodels", "evaluate"}  # nothing is merged
    for row in result.rows:
        for name in ("dollars", "hours", "flops"):
            assert getattr(row, name) == pytest.approx(sum(getattr(phase, name) for phase in row.phases))
        assert [phase.steps is None for phase in row.phases] == [
            phase.stage in ("cluster", "merge", "evaluate") for phase in row.phases
        ]
        # Curves end before the evaluation.
        assert row.curve[-1].dollars <= row.dollars - phases[row.arm]["evaluate"].dollars * (1 - 1e-9)
    assert joint.sources.keys() == set(DOMAINS)
    assert joint.specialisation.keys() == {"cluster", "source"}
    assert 0 <= joint.dead_experts <= 4  # two in each of two layers
    assert (ensemble.sources, ensemble.specialisation, ensemble.dead_experts) == (None, None, None)
    assert joint.unseen == read_json(output / "joint-tokens" / "evaluation" / "evaluation.json")["unseen"]["perplexity"]
    assert ensemble.unseen is None

    written = {row.run: (output / row.run / "finetuned" / "manifest.json").stat().st_mtime_ns for row in result.rows}
    again = compare(base, output, ["upcycle", "ensemble"], budgets=("tokens",), backend=LocalBackend())
    assert written == {
        row.run: (output / row.run / "finetuned" / "manifest.json").stat().st_mtime_ns for row in again.rows
    }
    assert [row.loss for row in again.rows] == [row.loss for row in result.rows]

    # Runs that an earlier comparison finished stay in the table, at present prices; unfinished ones do not.
    costly = base.pools.low_memory.model_copy(update={"price_per_hour": 2 * base.pools.low_memory.price_per_hour})
    base = base.model_copy(update={"pools": base.pools.model_copy(update={"low_memory": costly})})
    (output / "btx-tokens").mkdir()
    fewer = compare(base, output, ["upcycle"], budgets=("tokens",), backend=LocalBackend()).rows
    assert [row.run for row in fewer] == [row.run for row in result.rows]
    assert [row.loss for row in fewer] == [row.loss for row in result.rows]
    assert fewer[2].dollars > 1.5 * ensemble.dollars
