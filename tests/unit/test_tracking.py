import sys
import types

import pytest
from run_example import events

from moedisco_ray.cli.trackers import Mlflow, WeightsAndBiases, parameters, scalars, trackers
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.events import Event


def config(tmp_path, **tracking):
    return RunConfig.model_validate({
        "name": "demo", "corpus": {"sources": [{"path": "embedded"}]}, "output": str(tmp_path), "tracking": tracking})


@pytest.mark.parametrize(("tracking", "module", "line"), [
    ({"tensorboard": True}, "torch.utils.tensorboard",
     "tracking.tensorboard: True: tensorboard is not installed; pip install 'moedisco-ray[tensorboard]'"),
    ({"wandb": "p"}, "wandb", "tracking.wandb: 'p': wandb is not installed; pip install 'moedisco-ray[wandb]'"),
    ({"mlflow": "e"}, "mlflow", "tracking.mlflow: 'e': mlflow is not installed; pip install 'moedisco-ray[mlflow]'"),
])
def test_a_missing_library_is_an_error_with_a_remedy(tmp_path, monkeypatch, tracking, module, line):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError) as caught:
        trackers(config(tmp_path, **tracking))
    assert str(caught.value) == line


def test_no_tracker_unless_asked_for(tmp_path):
    assert trackers(config(tmp_path)) == ()


def test_scalars_are_over_the_units_tokens_and_finite():
    found = [scalar for event in events() for scalar in scalars(event)]
    assert {unit for unit, *_ in found} == {"seed", "submodel-0", "submodel-1"}
    assert ("seed", "loss", pytest.approx(2.943, abs=1e-3), 204_800) in found
    broken = events()[3]
    broken.data["loss"] = float("nan")
    assert [figure for _, figure, *_ in scalars(broken)] == ["lr", "grad_norm", "tokens_per_second"]


def test_trackers_get_the_totals_of_a_finished_runs_bill():
    totals = {"dollars": 0.5, "dollars_with_idle": 0.75, "seconds": 90.0}
    event = Event("run_finished", data={"seconds": 91.0, "bill": totals})
    assert list(scalars(event)) == [("bill", figure, value, 0) for figure, value in totals.items()]
    assert list(scalars(Event("run_finished", data={"seconds": 91.0}))) == []


def test_parameters_are_flat(tmp_path):
    flat = parameters(config(tmp_path))
    assert flat["tokens.total"] == "20000000"
    assert flat["corpus.sources.0.path"] == "embedded"


def test_tensorboard_files_hold_the_series(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415  # optional
    tracker, = trackers(config(tmp_path, tensorboard=True))
    assert not (tmp_path / "demo").exists()  # nothing is written before the run has claimed its directory
    for event in events():
        tracker(event)
    tracker.close()
    board = EventAccumulator(str(tmp_path / "demo" / "tensorboard" / "seed"))
    board.Reload()
    assert [(point.step, round(point.value, 3)) for point in board.Scalars("loss")] == [(102_400, 4.852), (204_800, 2.943)]


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


def test_wandb_gets_an_axis_of_tokens_per_unit(tmp_path):
    library = Recorder()
    tracker = WeightsAndBiases(config(tmp_path, wandb="p"), "p", library)
    for event in events():
        tracker(event)
    tracker.close()
    names = [name for name, *_ in library.calls]
    assert names[0] == "init"
    assert names[-1] == "finish"
    started = library.calls[0][2]
    assert started["config"]["name"] == "demo"
    assert (started["id"], started["group"], started["name"]) == ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "demo", "demo")
    axes = [(args[0], kwargs["step_metric"]) for name, args, kwargs in library.calls if name == "define_metric"]
    assert axes == [(f"{unit}/*", f"{unit}/tokens") for unit in ("seed", "submodel-0", "submodel-1")]
    logged = [args[0] for name, args, _ in library.calls if name == "log"]
    assert {"seed/loss": pytest.approx(2.943, abs=1e-3), "seed/tokens": 204_800} in logged


def test_mlflow_gets_parameters_and_metrics(tmp_path):
    library = Recorder()
    tracker = Mlflow(config(tmp_path, mlflow="e"), "e", library)
    for event in events():
        tracker(event)
    tracker.close()
    names = [name for name, *_ in library.calls]
    assert names[:3] == ["set_experiment", "start_run", "log_params"]
    assert names[-1] == "end_run"
    assert ("log_metric", ("seed/loss", pytest.approx(2.943, abs=1e-3)), {"step": 204_800}) in library.calls


def test_a_run_that_never_started_leaves_nothing(tmp_path):
    for tracker in (Mlflow(config(tmp_path), "e", Recorder()), WeightsAndBiases(config(tmp_path), "p", Recorder())):
        tracker(events()[3])
        tracker.close()
