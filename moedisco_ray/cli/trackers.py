"""Experiment trackers: a listener that hands a run's events and its results to TensorBoard, Weights & Biases and MLflow.

Each unit, such as `submodel-0`, is a run of its own in the tracker, grouped under the tracker's run of the whole run. `series`
names the series. A resumed run continues the tracker's runs.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol

from moedisco_ray.cli.series import RUN, Points, bill_points, parameters, plain, report_points, unit_points
from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.bill import metered_bill
from moedisco_ray.core.checksums import checked
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.events import Event, EventLog
from moedisco_ray.core.finished_models import finished_model
from moedisco_ray.core.metering import Meter
from moedisco_ray.core.run_record import RunReport

_BILL_SECONDS = 60.0
"""Minimum interval between two points of the bill while a stage runs (s)."""

End = Literal["FINISHED", "FAILED", "KILLED"]

_ENDS: dict[str, End] = {"run_finished": "FINISHED", "run_failed": "FAILED", "run_stopped": "KILLED"}


class Tracker(Protocol):
    """A tracker; `errors` are the exceptions that its library raises if the tracker cannot be reached."""

    name: ClassVar[str]
    errors: tuple[type[Exception], ...]

    def start(self, run_id: str) -> None:
        """Begin the tracker's run, or continue it."""

    def log(self, points: Points) -> None:
        """Log values of a unit, or of the run."""

    def results(self, report: RunReport, figures: Sequence[Path], model: Path | None) -> None:
        """Log samples, figures (PNG files), and the directory of the exported model, if it is wanted."""

    def end(self, how: End) -> None:
        """Flush and end all of the tracker's runs."""


def trackers(config: RunConfig) -> tuple[Tracking, ...]:
    """A listener for the trackers that the configuration names; none if it names none.

    Raises:
        ConfigError: A tracker's library is not installed.
    """
    wanted: list[Tracker] = []
    tracking = config.tracking
    if tracking.tensorboard:
        with _remedy("tensorboard", value=True):
            from torch.utils import tensorboard
        wanted.append(TensorBoard(config, tensorboard))
    if tracking.wandb is not None:
        with _remedy("wandb", tracking.wandb):
            import wandb
        wanted.append(WeightsAndBiases(config, tracking.wandb, wandb))
    if tracking.mlflow is not None:
        with _remedy("mlflow", tracking.mlflow):
            import mlflow
        wanted.append(Mlflow(config, tracking.mlflow, mlflow))
    return (Tracking(config, wanted),) if wanted else ()


class Tracking:
    """A listener that hands a run's events to trackers.

    A tracker that cannot be reached when the run starts is an error. A tracker that fails later is left out; the run continues.
    """

    def __init__(self, config: RunConfig, wanted: Sequence[Tracker]) -> None:
        self._config = config
        self._wanted = wanted
        self._running: list[Tracker] = []
        self._meter = Meter()
        self._billed = 0.0
        self._end: End = "KILLED"

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event.type == "run_started":
            self._start(event)
        self._meter.update(event)
        points = unit_points(event)
        if points is not None:
            self._log(points)
        if event.type == "stage_finished" or (event.type == "heartbeat" and event.time > self._billed + _BILL_SECONDS):
            self._billed = event.time
            self._log(bill_points(metered_bill(self._meter, self._config)))
        if event.type == "run_finished" and self._running:
            self._finish()
        self._end = _ENDS.get(event.type, self._end)

    def close(self) -> None:
        """End the trackers' runs."""
        self._each(lambda tracker: tracker.end(self._end))

    def _start(self, event: Event) -> None:
        for earlier in EventLog.read(self._config.directory / "events.jsonl"):
            self._meter.update(earlier)     # a resumed run's dollars include the earlier attempts'
        for tracker in self._wanted:
            try:
                tracker.start(event.data["id"])
            except tracker.errors as error:
                remedy = f"the tracker cannot be used ({_first_line(error)}); correct this, or set it to null"
                raise ConfigError(f"tracking.{tracker.name}", getattr(self._config.tracking, tracker.name), remedy) from error
            self._running.append(tracker)

    def _finish(self) -> None:
        from moedisco_ray.cli.figures import plot

        directory, model = self._config.directory, None
        report = RunReport.model_validate(checked(read_json(directory / "report.json")))
        drawn = plot(report, directory / "figures")
        if self._config.tracking.log_model:
            model = finished_model(self._config.location)
        for points in (bill_points(report.bill), *report_points(report)):
            self._log(points)
        self._each(lambda tracker: tracker.results(report, drawn, model))

    def _log(self, points: Points) -> None:
        self._each(lambda tracker: tracker.log(points))

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._running):
            try:
                act(tracker)
            except tracker.errors as error:
                self._running.remove(tracker)
                print(f"moedisco: tracking.{tracker.name} is left out from now on: {_first_line(error)}", file=sys.stderr)


class TensorBoard:
    """Writes to RUN_DIR/tensorboard, as one TensorBoard run per unit, so that units share a chart. It stores no models."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, config: RunConfig, library: ModuleType) -> None:
        self._config = config
        self._library = library
        self._writers: dict[str, Any] = {}
        self.errors: tuple[type[Exception], ...] = (OSError,)

    def start(self, run_id: str) -> None:
        """Send the run's configuration to the tracker."""
        lines = "\n".join(f"    {name}: {value}" for name, value in parameters(self._config).items())
        self._writer(RUN).add_text("config", f"    run: {run_id}\n{lines}")

    def log(self, points: Points) -> None:
        """Log values of a unit, or of the run."""
        writer = self._writer(points.unit, points.position)
        for name, value in points.values.items():
            writer.add_scalar(name, value, points.position)

    def results(self, report: RunReport, figures: Sequence[Path], model: Path | None) -> None:
        """Log samples and figures."""
        from matplotlib.image import imread

        del model
        writer = self._writer(RUN)
        for sample in report.samples:
            writer.add_text(f"samples/{plain(sample.prompt)}", f"**{sample.prompt}**{sample.text}")
        for figure in figures:
            writer.add_image(f"figures/{figure.stem}", imread(figure), dataformats="HWC")
        for each in self._writers.values():
            each.flush()    # a run at a URI uploads the files next

    def end(self, how: End) -> None:
        """Flush and close every file."""
        del how
        for writer in self._writers.values():
            writer.close()

    def _writer(self, unit: str, position: int | None = None) -> Any:
        # Open writers on first use: the run directory is claimed only when the run starts.
        if unit not in self._writers:
            # A resumed unit repeats what it did after its last checkpoint: the points that an earlier attempt wrote there go.
            self._writers[unit] = self._library.SummaryWriter(
                str(self._config.directory / "tensorboard" / unit), purge_step=position if unit else None)
        return self._writers[unit]


class WeightsAndBiases:
    """A Weights & Biases run under the run's id, and one per unit; together they form a group."""

    name: ClassVar[str] = "wandb"

    def __init__(self, config: RunConfig, project: str, library: ModuleType) -> None:
        self._config = config
        self._project = project
        self._library = library
        self._id = ""
        self._runs: dict[str, Any] = {}
        self._defined: set[tuple[str, str]] = set()
        self.errors: tuple[type[Exception], ...] = (OSError, library.Error)

    def start(self, run_id: str) -> None:
        """Begin the run, or continue it."""
        self._id = run_id
        self._run(RUN)

    def log(self, points: Points) -> None:
        """Log values of a unit, or of the run."""
        run = self._run(points.unit)
        for name in points.values:
            if (points.unit, name) not in self._defined:
                run.define_metric(name, step_metric=points.axis)
                self._defined.add((points.unit, name))
        run.log({**points.values, points.axis: points.position})

    def results(self, report: RunReport, figures: Sequence[Path], model: Path | None) -> None:
        """Log samples, figures and the model."""
        run, library = self._run(RUN), self._library
        if report.samples:
            rows = [[sample.prompt, sample.text] for sample in report.samples]
            run.log({"samples": library.Table(columns=["prompt", "text"], data=rows)})
        if figures:
            run.log({f"figures/{figure.stem}": library.Image(str(figure)) for figure in figures})
        if model is not None:
            run.log_model(path=str(model), name=f"{self._config.name}-model")

    def end(self, how: End) -> None:
        """End every run."""
        for run in self._runs.values():
            run.finish(exit_code=int(how != "FINISHED"))

    def _run(self, unit: str) -> Any:
        if unit not in self._runs:
            config = self._config
            self._runs[unit] = self._library.init(
                project=self._project, id="-".join(filter(None, (self._id, unit))), name=unit or config.name,
                group=f"{config.name}-{self._id}", job_type="unit" if unit else "run", resume="allow", reinit="create_new",
                tags=[f"{key}:{value}"[:64] for key, value in config.tags.items()],
                config=config.model_dump(mode="json"), dir=str(config.directory),
                # One run per process records the machine and greets; the log is the run directory's.
                settings=self._library.Settings(console="off", silent=bool(unit), x_disable_stats=bool(unit)))
        return self._runs[unit]


class Mlflow:
    """An MLflow run on the server at MLFLOW_TRACKING_URI, with a nested run per unit."""

    name: ClassVar[str] = "mlflow"

    def __init__(self, config: RunConfig, experiment: str, library: ModuleType) -> None:
        self._config = config
        self._experiment = experiment
        self._library = library
        self._client: Any = None
        self._id = self._experiment_id = ""
        self._runs: dict[str, str] = {}
        self.errors: tuple[type[Exception], ...] = (OSError, library.MlflowException)

    def start(self, run_id: str) -> None:
        """Begin the run, or continue it."""
        self._id = run_id
        self._experiment_id = self._library.set_experiment(self._experiment).experiment_id
        self._client = self._library.MlflowClient()
        self._client.log_dict(self._run(RUN), self._config.model_dump(mode="json"), "config.json")

    def log(self, points: Points) -> None:
        """Log values of a unit, or of the run."""
        # MLflow's active run belongs to one thread, and events come from several: name the run. A thread of MLflow's sends.
        self._library.log_metrics(points.values, step=points.position, run_id=self._run(points.unit), synchronous=False)

    def results(self, report: RunReport, figures: Sequence[Path], model: Path | None) -> None:
        """Log samples, figures, report and model."""
        client, run = self._client, self._run(RUN)
        client.log_dict(run, {"samples": [sample.model_dump() for sample in report.samples]}, "samples.json")
        client.log_artifact(run, str(self._config.directory / "report.json"))
        for figure in figures:
            client.log_artifact(run, str(figure), "figures")
        if model is not None:
            client.log_artifacts(run, str(model), "model")

    def end(self, how: End) -> None:
        """Send what is left, and end every run."""
        self._library.flush_async_logging()
        for run in self._runs.values():
            self._client.set_terminated(run, how)

    def _run(self, unit: str) -> str:
        if unit not in self._runs:
            name, client = "-".join(filter(None, (self._id, unit))), self._client
            found = client.search_runs([self._experiment_id], f"tags.`moedisco.id` = '{name}'", max_results=1)
            if found:
                self._runs[unit] = found[0].info.run_id
                client.update_run(self._runs[unit], status="RUNNING")
            else:
                self._runs[unit] = self._create(unit, name)
        return self._runs[unit]

    def _create(self, unit: str, name: str) -> str:
        tags = {**self._config.tags, "moedisco.id": name}
        if unit:
            tags["mlflow.parentRunId"] = self._runs[RUN]
        created: str = self._client.create_run(self._experiment_id, tags=tags, run_name=unit or self._config.name).info.run_id
        if not unit:
            self._library.log_params(parameters(self._config), run_id=created)
        return created


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def _remedy(name: str, value: Any) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        remedy = f"{name} is not installed; pip install 'moedisco-ray[{name}]'"
        raise ConfigError(f"tracking.{name}", value, remedy) from error
