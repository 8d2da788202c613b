"""The laboratory's commands."""

import io
import json

import pytest
from measured_example import MODEL, base_config, comparison, stored
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.study import __main__ as command_line
from benchmarks.study.advice import advise
from benchmarks.study.advice.advised import Goal
from benchmarks.study.advice.measured import Measurements, comparison_runs
from benchmarks.study.advice.table import advice_view
from benchmarks.study.grid import command
from moedisco_ray.core.artifacts import write_json
from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import TrainingError


def invoke(*arguments):
    return CliRunner().invoke(command_line.app, [str(argument) for argument in arguments], prog_name="study")


def text_of(renderable, width):
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(renderable)
    return console.file.getvalue()


@pytest.fixture
def demo(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(preset_text("demo"), encoding="utf-8")
    return path


@pytest.mark.parametrize(("options", "budgets"), [((), ("tokens", "dollars")), (("--to-loss",), ("tokens", "dollars", "loss")),
    (("--slice-tokens", "0"), ("tokens", "dollars"))])
def test_a_comparison_trains_each_arm_once_for_every_budget(demo, monkeypatch, options, budgets):
    asked = []

    def compare(base, output, names, *, budgets, view, slice_tokens):
        asked.append((output, names, budgets, slice_tokens))
        raise TrainingError("enough")

    monkeypatch.setattr(command_line, "compare", compare)
    result = invoke("compare", demo, "--arms", "disco,paper", "--output", demo.parent / "there", *options)
    assert result.exit_code == 1
    total = load_config(demo).tokens.total
    slices = 0 if "--slice-tokens" in options else total // 4
    assert asked == [(demo.parent / "there", ["disco", "paper"], budgets, slices)]


def test_it_advises_from_measured_runs(tmp_path):
    config, results = tmp_path / "small.yaml", tmp_path / "results"
    results.mkdir()
    config.write_text(json.dumps(base_config().model_dump(mode="json")))
    for seed in (0, 1):
        write_json(results / f"{seed}.json", stored(comparison(base_config(), seed=seed, noise=0.01)))
    shown = invoke("advise", config, "--from", results, "--budget-dollars", "0.001").stdout
    assert "small  for $0.0010: MoE-DisCo, as configured" in shown
    assert "--set tokens.total=" in shown
    assert "How sure: medium" in shown
    arguments = ("advise", config, "--from", results / "0.json", "--from", results / "1.json", "--target-loss", "2.7", "--json")
    advice = json.loads(invoke(*arguments).stdout)
    assert advice["sought"] == "dollars"
    assert advice["settings"]["tokens.total"]["now"] == 40_000_000


@pytest.mark.parametrize(("arguments", "line"), [
    (("--from", "x"), "moedisco: --from: 'x': needs one of --budget-dollars and --target-loss"),
    (("--from", "x", "--budget-dollars", 1, "--target-loss", 3),
     "moedisco: --from: 'x': needs one of --budget-dollars and --target-loss"),
    (("--from", "x", "--target-loss", 3),
     "moedisco: --from: 'x': holds no comparison (`python -m benchmarks.study compare` writes one) and no run"),
])
def test_half_a_question_to_measured_runs(demo, arguments, line):
    result = invoke("advise", demo, *arguments)
    assert result.exit_code == 2
    assert result.stderr == f"{line}\n"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("model", "kind", "value", "promise"), [
    (MODEL, "budget_dollars", 0.002, "predicted loss 2.6"),
    (MODEL, "target_loss", 2.7, "predicted to cost $0.00"),
    ({**MODEL, "hidden_size": 256}, "budget_dollars", 0.5, "joint training's loss for 3"),
])
def test_an_advice_is_whole_at_any_width(width, model, kind, value, promise):
    runs = tuple(run for seed in range(2) for run in comparison_runs(comparison(base_config(), seed=seed, noise=0.02)))
    config = base_config(model={"config": model}, submodels={"outer": {"momentum": 0.5}}, finetune={"load_balance": 0.125})
    advice = advise(config, Measurements(runs, ("going: not finished",)), Goal(kind=kind, value=value))
    text = text_of(advice_view(advice), width)
    assert promise in text
    assert f"How sure: {advice.confidence.level}" in text
    assert "Set aside: going: not finished" in text
    assert "--set finetune.load_balance=0.01" in text
    assert "instead of" in text
    assert "0.125" in text
    for row in advice.options:
        assert ("dominated" if row.dominated else f"{row.best_in:.0%}".replace("%", " %")) in text
    assert "…" not in text


def test_a_grid_takes_only_values_that_are_on_its_axes(tmp_path):
    result = invoke("grid", "--corpus", tmp_path, "--shapes", "16x2,12x2")
    assert result.exit_code == 2
    assert "--shapes: '12x2': is not on this axis; there are 16x2, 8x2, 32x2, 4x2" in " ".join(result.output.split())


def test_a_grid_measures_its_pieces_and_publishes_them(tmp_path, monkeypatch):
    asked, published = [], []
    monkeypatch.setattr(command, "run_pieces", lambda pieces, places, _, *, hours: asked.append((pieces, places, hours)) or [])
    monkeypatch.setattr(command, "publish", lambda *folders: published.append(folders))
    part = ("grid", "--corpus", tmp_path, "--work", tmp_path / "w", "--hours", "2", "--seeds", "0", "--budgets", "1,4", "--publish")
    assert invoke(*part, "--arms", "disco", "--as-configured").exit_code == 0
    pieces, places, hours = asked.pop()
    assert ({piece.arm for piece in pieces}, {piece.cell.budget for piece in pieces}, hours) == ({"joint", "disco"}, {1, 4}, 2)
    assert {piece.kind for piece in pieces} == {"report"}
    assert published == [(places.results, command.PUBLISHED)]
    assert invoke("grid", "--corpus", tmp_path, "--gpu").exit_code == 0
    pieces, _, _ = asked.pop()
    assert [piece.arm for piece in pieces if piece.kind == "report"] == ["joint", "disco", "expert-upcycling"]
    assert {(piece.cell.scale, piece.cell.tokens) for piece in pieces} == {("gpu", 400_000_000)}
