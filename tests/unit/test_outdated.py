"""After a setting changed, no command uses an artifact of the old settings until it is made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from damaged_runs import pinned_run
from typer.testing import CliRunner, Result

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stop_file import StopFile
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

LATER = ["finetune", "evaluate", "export"]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """The configuration of a finished run with another merge, which was made again; what follows it was not yet."""
    stop = tmp_path_factory.mktemp("changed") / "stop"

    def end(event: Event) -> None:
        if event.type == "stage_finished":
            stop.write_text("cancelled")

    with pinned_run() as made:
        made.restore()
        assert outdated(made.config) == []
        merge = made.config.merge.model_copy(update={"calibration_tokens": 1024})
        config = made.config.model_copy(update={"merge": merge})
        with pytest.raises(RunStopped):
            pipeline.run(config, (end,), redo=True, backend=LocalBackend(), stop=StopFile(stop))
        yield config


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments], input="hello\n", env={"COLUMNS": "300"})


def outdated(config: RunConfig) -> list[str]:
    done = invoke("show", config.directory, "--json")
    assert done.exit_code == 0, done.output
    return [stage["name"] for stage in json.loads(done.stdout)["stages"] if stage.get("outdated")]


def test_show_marks_the_stages_that_are_out_of_date_and_shows_the_rest(changed: RunConfig) -> None:
    """Protects readers of a run from old figures.

    Before (af276e38): `show` showed all stages alike.
    """
    shown = invoke("show", changed.directory)
    assert shown.exit_code == 0
    assert "finetune, evaluate, export: out of date" in " ".join(shown.stdout.split())
    assert "`moedisco run` with the run's configuration makes it again" in " ".join(shown.stdout.split())
    assert all(f"{stage} (out of date)" in shown.stdout for stage in [*LATER, "Validation"])
    assert "merge (out of date)" not in shown.stdout
    assert outdated(changed) == LATER


@pytest.mark.parametrize(
    ("command", "stage"),
    [
        ("chat {run}", "export"),
        ("chat {run}/model", "export"),
        ("evaluate {run}/model --sources {text}", "export"),
        ("evaluate {run}/finetuned --sources {text}", "finetune"),
        ("export {run} --output {new}", "finetune"),
        ("export {run} --to gguf --output {new}", "export"),
        ("experts {run} 0,1 --output {new}", "export"),
        ("push {run} org/name", "export"),
    ],
)
def test_no_command_takes_an_artifact_of_other_settings(
    changed: RunConfig, command: str, stage: str, tmp_path: Path
) -> None:
    """Protects users from a model that does not belong to the run's configuration.

    Before (af276e38): every command used the old model, exit 0; push only missed its token.
    """
    text = changed.corpus.sources[0].path
    done = invoke(*command.format(run=changed.directory, text=text, new=tmp_path / "new").split())
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
    assert f"its stage {stage} is out of date: it was made with other settings" in done.stderr
    assert "`moedisco run` with the run's configuration makes it again" in done.stderr
    assert not (tmp_path / "new").exists()


def test_plot_says_what_is_out_of_date(changed: RunConfig) -> None:
    """Protects readers of figures.

    Before (af276e38): `plot` said nothing.
    """
    done = invoke("plot", changed.directory)
    assert done.exit_code == 0
    assert [line.split()[2] for line in done.stderr.splitlines() if line.startswith("warning: stage ")] == LATER


def test_once_made_again_all_is_up_to_date(changed: RunConfig) -> None:
    pipeline.run(changed, backend=LocalBackend())
    assert outdated(changed) == []
    assert invoke("chat", changed.directory, "--max-tokens", "2").exit_code == 0
