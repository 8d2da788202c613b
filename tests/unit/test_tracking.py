import importlib.util
import json
import posixpath
import re
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from read_trackers import READERS
from run_example import events, report
from small_run import DOMAINS, small_config

from moedisco_ray.cli.series import parameters, plain, unit_points
from moedisco_ray.cli.tracking import Tracking, trackers
from moedisco_ray.contrib.trackers.mlflow import Mlflow
from moedisco_ray.contrib.trackers.wandb import WeightsAndBiases
from moedisco_ray.core import registry
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

pytestmark = pytest.mark.filterwarnings("default")  # the trackers' libraries warn about their own dependencies


def config(tmp_path, **trackers):
    return RunConfig.model_validate(
        {
            "name": "demo",
            "corpus": {"sources": [{"path": "embedded"}]},
            "output": str(tmp_path),
            "tracking": {"trackers": trackers},
            "tags": {"team": "language models"},
        }
    )


@pytest.mark.parametrize(
    ("tracking", "module", "line"),
    [
        (
            {"tensorboard": True},
            "tensorboard",
            (
                "tracking.trackers.tensorboard: True: needs the package tensorboard; "
                "pip install 'moedisco-ray[tensorboard]'"
            ),
        ),
        (
            {"wandb": "p"},
            "wandb",
            "tracking.trackers.wandb: 'p': needs the package wandb; pip install 'moedisco-ray[wandb]'",
        ),
        (
            {"mlflow": "e"},
            "mlflow",
            "tracking.trackers.mlflow: 'e': needs the package mlflow; pip install 'moedisco-ray[mlflow]'",
        ),
    ],
)
def test_a_missing_library_is_an_error_with_a_remedy(tmp_path, monkeypatch, tracking, module, line):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        trackers(config(tmp_path, **tracking))
    assert str(caught.value) == line


def test_no_tracker_unless_asked_for(tmp_path):
    assert trackers(config(tmp_path)) == ()


def test_points_are_over_the_units_tokens_and_finite():
    found = [points for event in events() if (points := unit_points(event)) is not None]
    assert {points.unit for points in found} == {"seed", "submodel-0", "submodel-1"}
    assert any(
        (points.unit, points.position, round(points.values["loss"], 3)) == ("seed", 204_800, 2.943) for points in found
    )
    broken = events()[3]
    broken.data["loss"] = float("nan")
    assert list(unit_points(broken).values) == ["lr", "grad_norm", "tokens_per_second"]


@given(st.text())
def test_names_are_taken_by_every_tracker(name):
    taken = plain(name)
    assert re.fullmatch(r"[\w./-]*", taken)
    assert not taken or taken == posixpath.normpath(taken)
    assert plain(taken) == taken


def test_parameters_are_flat(tmp_path):
    flat = parameters(config(tmp_path))
    assert flat["tokens.total"] == "20000000"
    assert flat["corpus.sources.0.path"] == "embedded"


class Recorder(types.ModuleType):
    """Stands for a library and records every call."""

    def __init__(self):
        super().__init__("recorder")
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


STOP = events().index(next(event for event in events() if event.type == "warning"))
MEASURED = [
    Event("evaluation", "submodels", "submodel-0", {"step": 10, "tokens": 20_480, "held_out_loss": 5.5}),
    Event(
        "progress",
        "finetune",
        "finetune",
        {
            "step": 1,
            "steps": 2,
            "tokens": 2048,
            "loss": 5.0,
            "lr": 1e-3,
            "grad_norm": 0.5,
            "tokens_per_second": 1e4,
            "mfu": 0.4,
            "largest_load": 1.5,
            "dead_experts": 1,
        },
    ),
    Event("stage_finished", "finetune", data={"seconds": 3.0, "summary": {}}),
]


def run_report():
    figures = {"documents": 1, "tokens": 1, "perplexity": 30.0}
    made = report()
    made["evaluation"] |= {
        "stages": {"seed": figures, "submodels": {"units": [figures] * 2}, "merge": figures, "finetune": figures},
        "start": {
            "perplexity": 99.0,
            "sources": [{"source": "docs", "perplexity": 98.0}],
            "clusters": [{"cluster": 3, "perplexity": 97.0}],
        },
        "unseen": {
            "perplexity": 50.0,
            "sources": [{"source": "news", "perplexity": 50.0}],
            "start": {"perplexity": 96.0, "sources": [{"source": "news", "perplexity": 96.0}]},
        },
        "owners": {"clinic": figures},
        "lm_eval": [{"task": "quiz", "examples": 4, "acc": 0.75}],
    }
    return made


ROWS = {
    "tensorboard": ("Tracking: TensorBoard", "tensorboard"),
    "wandb": ("Tracking: Weights & Biases", "wandb"),
    "mlflow": ("Tracking: MLflow", "mlflow-skinny"),
}


def environment(patch, folder):
    """Let trackers store everything in a folder, and send nothing."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }.items():
        patch.setenv(name, value)
    patch.chdir(folder)  # MLflow keeps artifacts in the current directory


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=pytest.mark.ecosystem(*ROWS[kind])) for kind in READERS]
)
def tracked(request, tmp_path_factory):
    """The name of a tracker, and what it has stored of a run that was stopped, resumed and finished."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    pytest.importorskip(kind, reason=f"{kind} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        environment(patch, folder)
        made = config(folder, **{kind: True if kind == "tensorboard" else "project"})
        started, *rest, last = (event for event in events() if event.type != "run_failed")
        stopped = Event("run_stopped", data={"reason": "cancelled"})
        for attempt in ([started, *rest[:STOP], stopped], [started, *rest[STOP - 4 :], *MEASURED, last]):
            (listener,) = trackers(made)
            # nothing is written before the run starts
            assert not (made.directory / kind).exists() or attempt[-1] is last
            for event in attempt:
                if event.type == "run_finished":
                    write(made.directory)
                listener(event)
            listener.close()
            # TensorBoard orders the files of a folder by name: by the second, then by a number as text, 10 before 9.
            time.sleep(1 - time.time() % 1)
        return kind, READERS[kind](made)


def write(directory):
    (directory / "report.json").write_text(json.dumps(run_report()), encoding="utf-8")


def test_every_promised_series_is_read_back(tracked):
    _, stored = tracked
    assert stored.units.keys() == {"seed", "submodel-0", "submodel-1", "finetune"}
    units = {name: unit.series for name, unit in stored.units.items()}
    assert units["seed"].keys() == {"loss", "lr", "grad_norm", "tokens_per_second"}
    assert units["finetune"].keys() == {
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "mfu",
        "largest_load",
        "dead_experts",
    }
    assert units["submodel-0"]["held_out_loss"] == [(20_480, 5.5)]
    assert units["submodel-0"]["perplexity"] == [(150_000, 30.0)]
    run = stored.series
    assert [value for _, value in run["perplexity/all"]] == pytest.approx([99.0, 30.0, 30.0, 41.25])
    assert [step for step, _ in run["perplexity/all"]] == [0, 360_000, 720_000, 1_080_000]
    assert run["perplexity/source/docs"] == [(0, 98.0), (1_080_000, 41.25)]
    assert run["perplexity/cluster/3"][0] == (0, 97.0)
    assert run["perplexity/unseen/news"] == [(0, 96.0), (1_080_000, 50.0)]
    for name in (
        "perplexity/source/cpp",
        "perplexity/cluster/3",
        "perplexity/owner/clinic",
        "perplexity/unseen",
        "perplexity/unseen/news",
        "accuracy/quiz",
        "experts/dead",
        "experts/dead/layer-2",
        "experts/largest_load/layer-2",
        "bits_per_byte/all",
        "stages/finetune/dollars",
        "stages/finetune/seconds",
        "stages/finetune/loss",
        "bill/dollars_with_idle",
    ):
        assert run[name][-1][0] in (1_080_000, 220), name
    assert run["bill/dollars"][-1] == (220, pytest.approx(0.018))
    assert len(run["bill/dollars"]) > 1  # while the run went on, too


def test_samples_figures_settings_and_tags_are_read_back(tracked):
    _, stored = tracked
    assert any("The license of the" in sample for sample in stored.samples)
    assert stored.figures == {"loss", "clusters", "experts"}
    assert "team:language models" in stored.tags
    assert stored.settings["name"] == "demo"


def test_a_resumed_run_continues_the_trackers_run(tracked):
    kind, stored = tracked
    for unit in ("seed", "submodel-0", "submodel-1"):
        positions = [position for position, _ in stored.units[unit].series["loss"]]
        assert positions == sorted(positions)
    if kind != "tensorboard":
        assert stored.ends[-1] == "FINISHED"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A configuration, and the readers of the trackers that followed its run."""
    folder = tmp_path_factory.mktemp("trained")
    kinds = [kind for kind in READERS if importlib.util.find_spec(kind)]
    with pytest.MonkeyPatch.context() as patch:
        environment(patch, folder)
        made = small_config(
            folder / "runs",
            tokens={"total": 60_000, "seed_share": 0.2, "finetune_share": 0.4},
            clusters={"count": 2},
            tracking={"trackers": {kind: True if kind == "tensorboard" else "project" for kind in kinds}},
            evaluation={"max_tokens": 2_000, "every_tokens": 4_096},
        )
        listeners = trackers(made)
        pipeline.run(made, listeners, backend=LocalBackend())
        for listener in listeners:
            listener.close()
        yield made, kinds


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.ecosystem(*ROWS[kind])) for kind in READERS])
def test_a_run_writes_every_promised_series(trained, kind):
    made, kinds = trained
    if kind not in kinds:
        pytest.skip(f"{kind} is not installed")
    stored = READERS[kind](made)
    assert stored.units.keys() == {"seed", "submodel-0", "submodel-1", "finetune"}
    for unit in stored.units.values():
        assert unit.series.keys() >= {"loss", "lr", "grad_norm", "tokens_per_second"}
    for unit in ("seed", "finetune"):
        assert len(stored.units[unit].series["held_out_loss"]) > 1
    assert stored.units["finetune"].series.keys() >= {"largest_load", "dead_experts"}
    assert {"submodel-0", "submodel-1"} <= {name for name, unit in stored.units.items() if "perplexity" in unit.series}
    assert stored.series.keys() >= {
        "perplexity/all",
        "bits_per_byte/all",
        *(f"perplexity/source/{name}" for name in DOMAINS),
        *(f"perplexity/cluster/{cluster}" for cluster in range(2)),
        "experts/dead",
        "experts/largest_load/layer-0",
        "bill/dollars",
        "stages/finetune/dollars",
        "stages/finetune/tokens_per_second_per_worker",
    }
    assert stored.samples
    assert stored.figures == {"loss", "clusters", "experts"}


class Faulty:
    """A tracker that raises an error after a number of calls."""

    name = "mlflow"
    errors = (OSError,)

    def __init__(self, calls):
        self.left = calls

    def start(self, *_):
        if not self.left:
            raise OSError("no route to host\nmore")
        self.left -= 1

    log = results = end = start


def test_a_tracker_that_cannot_be_reached_when_the_run_starts_is_an_error(tmp_path):
    made = config(tmp_path, mlflow="project")
    with pytest.raises(ConfigError) as caught:
        Tracking(made, [Faulty(0)])(events()[0])
    assert str(caught.value) == (
        "tracking.trackers.mlflow: 'project': the tracker cannot be used (no route to host); correct this, or remove it"
    )


def test_a_tracker_that_fails_later_is_left_out(tmp_path, capsys):
    sound, faulty = Faulty(99), Faulty(3)
    listener = Tracking(config(tmp_path, mlflow="project"), [faulty, sound])
    sequence = [event for event in events() if event.type != "run_finished"]
    for event in sequence:
        listener(event)
    listener.close()
    assert capsys.readouterr().err == "moedisco: tracking.trackers.mlflow is left out from now on: no route to host\n"
    assert sound.left == 99 - 1 - 4 - 2 - 1  # the start, progress, the bill after each stage, the end


def test_an_unreachable_mlflow_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    (listener,) = trackers(config(tmp_path, mlflow="project"))
    with pytest.raises(ConfigError, match=r"^tracking.trackers.mlflow: 'project': the tracker cannot be used \(.*\); "):
        listener(events()[0])


def test_a_run_that_never_started_leaves_nothing(tmp_path):
    for kind in (Mlflow, WeightsAndBiases):
        library = Recorder()
        listener = Tracking(config(tmp_path), [kind(config(tmp_path), "p", library)])
        listener(events()[3])
        listener.close()
        assert library.calls == []


def test_a_tracker_that_does_not_exist_and_a_project_of_tensorboard_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"^tracking.trackers.tensorboard: 'p': must be true: "):
        trackers(config(tmp_path, tensorboard="p"))
    with pytest.raises(
        ConfigError, match=r"^tracking.trackers.wandbb: 'wandbb': must be 'tensorboard', 'wandb' or 'mlflow'"
    ):
        check_config(
            {"name": "demo", "corpus": {"sources": [{"path": "embedded"}]}, "tracking": {"trackers": {"wandbb": "p"}}}
        )


def test_a_tracker_is_a_file_and_a_line_of_the_registry(tmp_path, monkeypatch):
    module = types.ModuleType("toy_tracker")
    tracker = Faulty(99)
    module.open_tracker = lambda *_: tracker
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.TRACKERS, "toy", registry.Entry("toy_tracker:open_tracker"))
    (listener,) = trackers(config(tmp_path, toy=True))
    listener(events()[0])
    assert tracker.left == 98
