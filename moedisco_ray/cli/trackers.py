"""Experiment trackers: listeners that hand a run's events to TensorBoard, Weights & Biases or MLflow.

Series are named UNIT/FIGURE, such as `submodel-0/loss`; their x-axis is the number of tokens that the unit was trained on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.events import BILL_FIGURES, Event

_FIGURES = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu")


class Tracker(Protocol):
    """A listener that sends a run's events to a tracker."""

    def __call__(self, event: Event) -> None:
        """Handle an event."""

    def close(self) -> None:
        """Flush and close."""


def trackers(config: RunConfig) -> tuple[Tracker, ...]:
    """The trackers that the configuration names.

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
    return tuple(wanted)


class TensorBoard:
    """Writes to RUN_DIR/tensorboard, as one TensorBoard run per unit, so that units share a chart."""

    def __init__(self, config: RunConfig, library: ModuleType) -> None:
        self._config = config
        self._library = library
        self._writers: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event.type == "run_started":
            lines = "\n".join(f"    {name}: {value}" for name, value in parameters(self._config).items())
            self._writer(".").add_text("config", lines)
        for unit, figure, value, tokens in scalars(event):
            self._writer(unit).add_scalar(figure, value, tokens)

    def close(self) -> None:
        """Flush and close every file."""
        for writer in self._writers.values():
            writer.close()

    def _writer(self, unit: str) -> Any:
        # Open writers on first use: the run directory is claimed only when the run starts.
        if unit not in self._writers:
            self._writers[unit] = self._library.SummaryWriter(str(self._config.directory / "tensorboard" / unit))
        return self._writers[unit]


class WeightsAndBiases:
    """One Weights & Biases run under the run's id, so that a resumed run continues it; runs with the same name form a group."""

    def __init__(self, config: RunConfig, project: str, library: ModuleType) -> None:
        self._config = config
        self._project = project
        self._library = library
        self._run: Any = None
        self._units: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event.type == "run_started":
            directory = self._config.directory
            self._run = self._library.init(
                project=self._project, name=self._config.name, group=self._config.name, id=event.data["id"], resume="allow",
                config=self._config.model_dump(mode="json"), dir=str(directory))
        for unit, figure, value, tokens in scalars(event):
            if self._run is None:
                return
            if unit not in self._units:
                # Units train at the same time, so each needs its own axis of tokens.
                self._run.define_metric(f"{unit}/*", step_metric=f"{unit}/tokens")
                self._units.add(unit)
            self._run.log({f"{unit}/{figure}": value, f"{unit}/tokens": tokens})

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()


class Mlflow:
    """One MLflow run on the server at MLFLOW_TRACKING_URI."""

    def __init__(self, config: RunConfig, experiment: str, library: ModuleType) -> None:
        self._config = config
        self._experiment = experiment
        self._library = library
        self._started = False

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        if event.type == "run_started":
            self._library.set_experiment(self._experiment)
            self._library.start_run(run_name=self._config.name, tags=dict(self._config.tags))
            self._library.log_params(parameters(self._config))
            self._started = True
        for unit, figure, value, tokens in scalars(event):
            if self._started:
                self._library.log_metric(f"{unit}/{figure}", value, step=tokens)

    def close(self) -> None:
        """End the run."""
        if self._started:
            self._library.end_run()


def scalars(event: Event) -> Iterator[tuple[str, str, float, int]]:
    """Yield (unit, figure, value, tokens) for each finite number in a progress event, and for the bill of a finished run."""
    if event.type == "run_finished":
        for figure in BILL_FIGURES:
            if (total := event.data.get("bill", {}).get(figure)) is not None:
                yield "bill", figure, float(total), 0
    if event.type != "progress" or event.unit is None:
        return
    tokens = int(event.data.get("tokens", 0))
    for figure in _FIGURES:
        value = event.data.get(figure)
        if value is not None and math.isfinite(value):
            yield event.unit, figure, float(value), tokens


def parameters(config: RunConfig) -> dict[str, str]:
    """The configuration as flat `section.setting` pairs."""
    return dict(_flatten(config.model_dump(mode="json"), ""))


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if children is None:
        yield path, str(value)
        return
    for key, child in children:
        yield from _flatten(child, f"{path}.{key}" if path else str(key))


@contextlib.contextmanager
def _remedy(name: str, value: Any) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        remedy = f"{name} is not installed; pip install 'moedisco-ray[{name}]'"
        raise ConfigError(f"tracking.{name}", value, remedy) from error
