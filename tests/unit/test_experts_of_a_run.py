"""`moedisco experts` on a trained run of four experts: models of other sizes, an expert replaced, an expert removed."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from small_run import DOMAINS, small_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.contrib.experts.choose_experts import GENERAL
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

NEW = "multiprocessing"
pytestmark = pytest.mark.slow  # two runs; test_chosen_experts.py has the same without a run
MODULES = DOMAINS | {NEW: multiprocessing}
LENGTH, MOST_WORSE = 64, 0.01


def documents(module: ModuleType, *, unseen: bool) -> list[str]:
    """Paragraphs of a package's source text; one in eight is in no run's text."""
    files = sorted(Path(str(module.__file__)).parent.glob("*.py"))
    found = [each for file in files for each in file.read_text(encoding="utf-8").split("\n\n") if len(each) > 40]
    return [each for number, each in enumerate(found) if (number % 8 == 0) == unseen]


def train(home: Path, name: str, texts: list[str], **changes: Any) -> Path:
    sources = [
        {"path": str(home / f"{each}.txt"), "name": each, "documents": "paragraph", "format": "text"} for each in texts
    ]
    return pipeline.run(
        small_config(
            home,
            name=name,
            corpus={"sources": sources},
            clusters={"count": 4},
            checkpoint={"every": 1000},
            evaluation={"stages": False, "max_tokens": 500},
            **changes,
        ),
        backend=LocalBackend(),
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four sub-models and experts on three domains, and a run that continues with text of a fourth."""
    home = tmp_path_factory.mktemp("runs")
    for name, module in MODULES.items():
        (home / f"{name}.txt").write_text("\n\n".join(documents(module, unseen=False)), encoding="utf-8")
    model = (
        train(
            home,
            "run",
            list(DOMAINS),
            tokens={"total": 160_000, "finetune_share": 0.4},
            model={
                "config": {
                    "hidden_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "moe_intermediate_size": 128,
                    "num_experts": 4,
                    "num_experts_per_tok": 2,
                }
            },
        )
        / "model"
    )
    card = model / "README.md"
    card.write_text(
        card.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\nlanguage: [en]\n", 1), encoding="utf-8"
    )
    train(
        home,
        "later",
        [NEW],
        tokens={"total": 60_000, "finetune_share": 1.0},
        model={"family": None, "config": None, "init": {"checkpoint": str(model)}},
    )
    return home


@torch.no_grad()
def perplexities(directory: Path) -> dict[str, float]:
    """Perplexity that transformers computes on each domain's text that no run has seen."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values())
    tokenizer, found = AutoTokenizer.from_pretrained(directory), dict[str, float]()
    for name, module in MODULES.items():
        ids = torch.tensor(tokenizer(tokenizer.eos_token.join(documents(module, unseen=True)))["input_ids"])
        ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)[::2]
        found[name] = model(input_ids=ids, labels=ids).loss.exp().item()
    return found


@pytest.fixture(scope="module")
def before(home: Path) -> dict[str, float]:
    return perplexities(home / "run" / "model")


def experts(home: Path, output: Path, *arguments: str, calibration: Sequence[str] = ()) -> str:
    """What the command prints; a domain's text is given for calibration, or as own text."""
    texts = [part for name in DOMAINS if name not in calibration for part in ("--own-text", str(home / f"{name}.txt"))]
    texts += [part for name in calibration for part in ("--calibration", str(home / f"{name}.txt"))]
    arguments = ("experts", str(home / "run"), *arguments, "--output", str(output), "--max-tokens", "60000", *texts)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def changes(before: Mapping[str, float], output: Path) -> dict[str, float]:
    """Changes of the perplexities on the domains by transformers, after a check of the recorded perplexities."""
    after, found = perplexities(output), json.loads((output / "experts.json").read_text(encoding="utf-8"))
    old, new = (row["perplexity"] for row in found["losses"])
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    recorded = {Path(text).stem: ratio for text, ratio in zip(found["texts"], ratios, strict=True) if text != GENERAL}
    # of other documents
    assert recorded == pytest.approx({name: after[name] / before[name] for name in recorded}, rel=0.03)
    return {name: after[name] / before[name] - 1 for name in after}


@pytest.mark.ecosystem("Use: models of four sizes out of one run in transformers", "transformers")
@pytest.mark.parametrize(
    ("name", "arguments", "size", "most_worse"),
    [
        ("half of them", ["0,2"], (2, 2), 0.03),
        ("all experts", ["0-3"], (4, 2), 0.0),
        ("one dense expert", ["0"], (1, 1), 0.06),
        ("top-1", ["0-3", "--top-k", "1"], (4, 1), MOST_WORSE),
    ],
)
def test_models_of_other_sizes_come_out_of_one_run(
    name: str,
    arguments: list[str],
    size: tuple[int, int],
    most_worse: float,
    home: Path,
    before: dict[str, float],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    experts(home, tmp_path / "plain", *arguments)
    worse = changes(before, tmp_path / "plain")
    config = AutoConfig.from_pretrained(tmp_path / "plain")
    assert (config.num_experts, config.num_experts_per_tok) == size
    if name != "all experts":
        experts(home, tmp_path / "refitted", *arguments, calibration=list(DOMAINS))
        better = changes(before, tmp_path / "refitted")
        assert all(better[each] < worse[each] for each in DOMAINS)
        worse = better
    assert max(worse[each] for each in DOMAINS) <= most_worse
    perplexity = "/".join(f"{(1 + worse[each]) * before[each]:.1f}" for each in DOMAINS)
    record_property("measured", f"{name}: held-out perplexity on {'/'.join(DOMAINS)} {perplexity}")


def test_an_expert_is_removed_and_the_others_are_refitted(home: Path, before: dict[str, float], tmp_path: Path) -> None:
    """Without the refit, each domain loses more than the 1 % that it may lose."""
    experts(home, tmp_path / "plain", "0,2,3")
    experts(home, tmp_path / "refitted", "0,2,3", calibration=list(DOMAINS))
    plain, refitted = (changes(before, tmp_path / name) for name in ("plain", "refitted"))
    for name in DOMAINS:
        assert refitted[name] < MOST_WORSE < plain[name]


@pytest.mark.parametrize("calibration", [[], [NEW]])
def test_an_expert_is_replaced(calibration: list[str], home: Path, before: dict[str, float], tmp_path: Path) -> None:
    experts(home, tmp_path / "replaced", f"{home / 'later'}:0", "1-3", calibration=calibration)
    found = changes(before, tmp_path / "replaced")
    assert max(found[name] for name in DOMAINS) < MOST_WORSE
    assert calibration or found[NEW] < -0.01


def shown(figures: Sequence[float]) -> list[str]:
    return [f"{each:.4g}" for each in figures]


def test_own_text_is_enough_to_measure(home: Path, tmp_path: Path) -> None:
    output = tmp_path / "three"
    lines = [line.split() for line in experts(home, output, "0-2").splitlines() if line.strip()]
    found = json.loads((output / "experts.json").read_text(encoding="utf-8"))
    assert lines[0] == ["held-out", "perplexity", *(f"{name}.txt" for name in DOMAINS), GENERAL, "mixture"]
    old, new = (shown(row["perplexity"]) for row in found["losses"])
    assert [line[1:5] for line in lines if len(line) == 6 and line[0] != "held-out"] == [old, new]
    assert len(found["warnings"]) == sum(row.startswith("warning: on") for row in map(" ".join, lines)) > 0
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.language, card.data.model_name) == ("mit", ["en"], "three")
    names = [*(f"{name}.txt" for name in DOMAINS), GENERAL]
    figures = {
        each.dataset_name: each.metric_value for each in card.data.eval_results if each.metric_type == "perplexity"
    }
    assert list(figures) == [f"text: {name}" for name in names]
    assert list(figures.values()) == [round(value, 6) for value in found["losses"][1]["perplexity"]]
    assert f"read, spread over the text: {found['shares'][0]:.1%} of {next(iter(DOMAINS))}.txt" in " ".join(
        map(" ".join, lines)
    )
    assert f"* perplexity on documents of asyncio.txt: {new[0]}, and {old[0]} of " in card.text
