"""A run that ended worse than the model that it started from says so first, wherever its result is shown."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import run_example
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.export_summary import ExportSummary
from moedisco_ray.core.records.findings import against_start
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import Figures
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.stages.export.card import model_card

WORSE = "WORSE THAN ITS START: perplexity 94.50, the start had 67.30 on the same text"
losses = st.floats(0, 20)


def evaluated(loss, start):
    figures = run_example.report()["evaluation"]
    before = {"start": {"loss": start, "perplexity": math.exp(start), "documents": 120, "tokens": 48_000}}
    return {**figures, "loss": loss, "perplexity": math.exp(loss), **before}


BAD, GOOD = evaluated(math.log(94.5), math.log(67.3)), evaluated(math.log(61.2), math.log(67.3))


def stored(directory, evaluation):
    """A finished run's directory, with what `show` reads."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "report.json", run_example.report() | {"evaluation": evaluation})
    return directory


def shown(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments]).stdout


@given(losses, losses)
def test_the_verdict_depends_on_the_two_losses_alone(loss, start):
    found = against_start(Figures(loss=loss), Figures(loss=start))
    assert found.worse == (loss - start > 1e-4)
    assert found.worse == found.words.startswith("WORSE THAN ITS START: ")
    assert found.worse <= (found.perplexity > found.start_perplexity)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_a_model_that_computes_no_usable_loss_is_worse(loss):
    found = against_start(Figures(loss=loss), Figures(loss=3.0))
    assert found.worse
    assert found.words.startswith("WORSE THAN ITS START: ")


@given(losses)
def test_there_is_no_verdict_without_a_start_or_without_a_measurement(loss):
    assert against_start(Figures(loss=loss), None) is None
    assert against_start(Figures(), Figures(loss=loss)) is None
    assert against_start(Figures(loss=loss), Figures()) is None


def test_show_begins_with_it(tmp_path):
    """The first line of the terminal's view is the verdict.

    Before (af276e38): the first line was `demo  qwen3_moe`; a note on the losses came after the clusters.
    """
    assert shown("show", stored(tmp_path / "bad", BAD)).splitlines()[0] == WORSE
    for evaluation in (GOOD, run_example.report()["evaluation"]):
        assert "WORSE" not in shown("show", stored(tmp_path / "good", evaluation))


def test_the_end_of_a_run_begins_with_it(tmp_path, monkeypatch):
    """The table after a run comes after the verdict.

    Before (af276e38): neither the line of the end nor what comes before the table said it.
    """
    directory = stored(tmp_path / "bad", BAD)

    def pipeline(config, listeners, *_, **__):
        del config
        for listener in listeners:
            listener(Event("run_started", data={"name": "demo", "directory": str(directory), "stages": []}))
            listener(Event("run_finished", data={"seconds": 3.0, "worse_than_start": WORSE}))
        return directory

    module = types.ModuleType("moedisco_ray.execution.pipeline")
    module.run = pipeline
    monkeypatch.setitem(sys.modules, "moedisco_ray.execution.pipeline", module)
    (tmp_path / "demo.yaml").write_text(preset_text("demo"))
    lines = shown("run", tmp_path / "demo.yaml").splitlines()
    assert any(f"{WORSE}; finished in 3.0 s" in line for line in lines)
    rest = lines[next(number for number, line in enumerate(lines) if "finished in" in line) + 1 :]
    assert next(line for line in rest if line.strip()) == WORSE


def test_the_report_has_it_before_everything_else(tmp_path):
    """`report.json`, which the REST API serves, has the verdict as its first figure.

    Before (af276e38): the report had both losses, deep in `evaluation`, and no verdict.
    """
    config = RunConfig.model_validate({"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}})
    write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / "evaluation.json", BAD)
    found = json.loads(shown("show", tmp_path, "--json"))
    assert list(found)[:2] == ["schema_version", "against_start"]
    assert found["against_start"] == {
        "worse": True,
        "perplexity": pytest.approx(94.5),
        "start_perplexity": pytest.approx(67.3),
        "words": WORSE,
    }


def test_the_model_card_has_it_under_the_name():
    """A reader of the card sees the verdict before anything else.

    Before (af276e38): the text under the name began with `A Mixture-of-Experts language model of the`.
    """
    for evaluation, words in ((BAD, f"> **{WORSE}.**"), (GOOD, "A Mixture-of-Experts language model")):
        report = RunReport.model_validate(run_example.report() | {"evaluation": evaluation})
        card = model_card(report, ExportSummary(parameters=1, active_parameters=1))
        assert card.partition("\n# demo\n")[2].strip().startswith(words)
