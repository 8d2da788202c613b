"""MLflow: runs in an experiment of its server, which MLFLOW_TRACKING_URI names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from moedisco_ray.cli.series import RUN, Points, parameters
from moedisco_ray.cli.tracking import End
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.run_record import RunReport


def open_tracker(config: RunConfig, project: str | Literal[True], setting: str) -> Mlflow:
    """With true, the experiment has the name of the run."""
    import mlflow

    del setting
    return Mlflow(config, config.name if project is True else project, mlflow)


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
        # MLflow's active run belongs to one thread, and events come from several: name the run. A thread of MLflow's
        # sends.
        self._library.log_metrics(points.values, step=points.position, run_id=self._run(points.unit), synchronous=False)

    def results(self, report: RunReport, figures: Sequence[Path]) -> None:
        """Log samples, figures and report."""
        client, run = self._client, self._run(RUN)
        client.log_dict(run, {"samples": [sample.model_dump() for sample in report.samples]}, "samples.json")
        client.log_artifact(run, str(self._config.directory / "report.json"))
        for figure in figures:
            client.log_artifact(run, str(figure), "figures")

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
        created: str = self._client.create_run(
            self._experiment_id, tags=tags, run_name=unit or self._config.name
        ).info.run_id
        if not unit:
            self._library.log_params(parameters(self._config), run_id=created)
        return created
