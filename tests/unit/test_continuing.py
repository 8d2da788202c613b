"""That the same command continues is said only where it does: it depends on the command, and on what is stored."""

from __future__ import annotations

import errno
import sys
import types

import pytest
import typer
from click.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import RunStopped
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import reporting_full_disk

COMMANDS = sorted(typer.main.get_command(app).commands)


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_but_those_that_store_promises_to_continue(name):
    """Ctrl-C in a command that has stored nothing ends with the word `interrupted`, and no promise.

    Before (af276e38): each of the commands, `plan` and `schema` too, said that it continues from the last checkpoint.
    """
    group = typer.main.get_command(app)
    group.commands[name].params, group.commands[name].invoke = [], interrupt
    ended = CliRunner().invoke(group, [name])
    assert ended.exit_code == 130
    assert ended.stderr == "moedisco: interrupted\n"


START = [Event("run_started", data={"name": "demo", "directory": "absent", "stages": ["corpus", "seed"]})]
CORPUS = Event("stage_finished", "corpus", data={"seconds": 1.0})
CHECKPOINT = Event("checkpoint", "seed", "seed", {"step": 3, "stall": 0.1, "latency": 0.1})
NOTHING = "nothing is stored yet: the same command begins anew"


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """Runs `moedisco run` with a pipeline that emits events and fails, and returns the line about the end."""

    def run(events, error, *options):
        def pipeline(config, listeners, *_, **__):
            del config
            for event in events:
                for listener in listeners:
                    listener(event)
            raise error

        module = types.ModuleType("moedisco_ray.execution.pipeline")
        module.run = pipeline
        monkeypatch.setitem(sys.modules, "moedisco_ray.execution.pipeline", module)
        path = tmp_path / "demo.yaml"
        path.write_text(preset_text("demo"))
        return (
            CliRunner().invoke(typer.main.get_command(app), ["run", str(path), *map(str, options)]).stderr.rstrip("\n")
        )

    return run


def full(path):
    with pytest.raises(ValueError, match="disk is full") as caught, reporting_full_disk(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    return caught.value


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "interrupted"),
        (START, f"interrupted; {NOTHING}"),
        ([*START, CORPUS], "interrupted; the same command continues after the stage corpus"),
        ([*START, Event("stage_skipped", "corpus")], "interrupted; the same command continues after the stage corpus"),
        ([*START, CORPUS, CHECKPOINT], "interrupted; the same command continues from the last checkpoint"),
        (
            [*START, CORPUS, CHECKPOINT, Event("stage_finished", "seed", data={"seconds": 1.0})],
            "interrupted; the same command continues after the stage seed",
        ),
    ],
)
def test_a_run_says_from_where_the_same_command_continues(ended, events, words):
    """Without a finished stage and a checkpoint, nothing continues.

    Before (af276e38): all of them said `interrupted; the same command continues from the last checkpoint`.
    """
    assert ended(events, KeyboardInterrupt()) == f"moedisco: {words}"


def test_what_an_earlier_attempt_stored_is_not_called_nothing(ended, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text("{}")
    start = [Event("run_started", data=START[0].data | {"directory": str(tmp_path)})]
    assert (
        ended(start, KeyboardInterrupt())
        == "moedisco: interrupted; the same command continues from what was stored before"
    )
    assert ended(start, KeyboardInterrupt(), "--redo") == "moedisco: interrupted"


def test_a_full_disk_promises_to_resume_only_what_is_stored(ended, tmp_path):
    """A disk that is full before anything is stored leaves nothing to resume.

    Before (af276e38): `the disk is full; free some space and run the same command again: it resumes`, in `export` too.
    """
    said = f"moedisco: output: '{tmp_path}': the disk is full; free some space and run the command again"
    assert ended(START, full(tmp_path)) == f"{said}; {NOTHING}"
    assert ended([*START, CORPUS], full(tmp_path)) == f"{said}; the same command continues after the stage corpus"


def test_a_stop_file_that_still_exists_is_named(ended, tmp_path):
    """While the stop file exists, the same command stops again at once.

    Before (af276e38): `stopped (cancelled); run the same command again to resume from the last checkpoint`.
    """
    stop = tmp_path / "stop"
    stop.write_text("cancelled")
    assert ended([*START, CHECKPOINT], RunStopped("cancelled"), "--stop-file", stop) == (
        f"moedisco: stopped (cancelled); without the stop file {stop}, "
        "the same command continues from the last checkpoint"
    )
