"""The laboratory's commands."""

import pytest
from typer.testing import CliRunner

from benchmarks.study import __main__ as command_line
from benchmarks.study.grid import command
from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import TrainingError


def invoke(*arguments):
    return CliRunner().invoke(command_line.app, [str(argument) for argument in arguments], prog_name="study")


@pytest.fixture
def demo(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text(preset_text("demo"), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("options", "budgets"),
    [
        ((), ("tokens", "dollars")),
        (("--to-loss",), ("tokens", "dollars", "loss")),
        (("--slice-tokens", "0"), ("tokens", "dollars")),
    ],
)
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


def test_a_grid_takes_only_values_that_are_on_its_axes(tmp_path):
    result = invoke("grid", "--corpus", tmp_path, "--shapes", "16x2,12x2")
    assert result.exit_code == 2
    assert "--shapes: '12x2': is not on this axis; there are 16x2, 8x2, 32x2, 4x2" in " ".join(result.output.split())
    result = invoke("grid", "--corpus", tmp_path, "--arms", "joint-low")  # it is derived from joint training
    assert (result.exit_code, "--arms: 'joint-low': is not on this axis" in " ".join(result.output.split())) == (
        2,
        True,
    )


def test_a_grid_without_its_folder_of_corpora_says_so(tmp_path):
    result = invoke("grid", "--corpus", tmp_path / "none")
    assert (result.exit_code, "is no folder" in " ".join(result.output.split())) == (2, True)


def test_a_grid_without_text_to_tune_on_says_what_to_do(tmp_path):
    result = invoke("grid", "--corpus", tmp_path)
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "has no folder 'small8'" in said
    assert "--as-configured" in said


def test_a_grid_measures_its_pieces_and_publishes_them(tmp_path, monkeypatch):
    asked, published = [], []
    monkeypatch.setattr(
        command, "run_pieces", lambda pieces, places, _, *, hours: asked.append((pieces, places, hours)) or []
    )
    monkeypatch.setattr(command, "publish", lambda *folders: published.append(folders))
    part = (
        "grid",
        "--corpus",
        tmp_path,
        "--work",
        tmp_path / "w",
        "--hours",
        "2",
        "--seeds",
        "0",
        "--budgets",
        "1,4",
        "--publish",
    )
    assert invoke(*part, "--arms", "disco", "--as-configured").exit_code == 0
    pieces, places, hours = asked.pop()
    assert ({piece.arm for piece in pieces}, {piece.cell.budget for piece in pieces}, hours) == (
        {"joint", "disco"},
        {1, 4},
        2,
    )
    assert {piece.kind for piece in pieces} == {"report"}
    assert published == [(places.results, command.PUBLISHED)]
    refused = invoke("grid", "--corpus", tmp_path, "--gpu").output
    assert "--gpu: needs a larger text than the embedded one" in " ".join(refused.split())
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "domain.txt").write_text("text")
    assert invoke("grid", "--corpus", tmp_path, "--gpu").exit_code == 0
    pieces, _, _ = asked.pop()
    assert [(piece.kind, piece.arm) for piece in pieces] == [
        ("report", arm) for arm in ("joint", "disco", "expert-upcycling")
    ]
    assert {(piece.cell.corpus, piece.cell.scale, piece.cell.tokens) for piece in pieces} == {
        ("large", "gpu", 400_000_000)
    }
    assert (
        invoke(
            "grid", "--corpus", tmp_path, "--small", "--corpora", "large", "--budgets", "4", "--as-configured"
        ).exit_code
        == 0
    )
    pieces, _, _ = asked.pop()
    assert {(piece.cell.scale, piece.cell.tokens) for piece in pieces} == {("small", 4_600_000)}
    assert "--small: is a model for a CPU" in " ".join(
        invoke("grid", "--corpus", tmp_path, "--small", "--gpu").output.split()
    )
