"""Weights & Biases: runs in a project of its server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from moedisco_ray.cli.series import RUN, Points
from moedisco_ray.cli.tracking import End
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.run_record import RunReport


def open_tracker(config: RunConfig, project: str | Literal[True], setting: str) -> WeightsAndBiases:
    """With true, the project has the name of the run."""
    import wandb

    del setting
    return WeightsAndBiases(config, config.name if project is True else project, wandb)


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

    def results(self, report: RunReport, figures: Sequence[Path]) -> None:
        """Log samples and figures."""
        run, library = self._run(RUN), self._library
        if report.samples:
            rows = [[sample.prompt, sample.text] for sample in report.samples]
            run.log({"samples": library.Table(columns=["prompt", "text"], data=rows)})
        if figures:
            run.log({f"figures/{figure.stem}": library.Image(str(figure)) for figure in figures})

    def end(self, how: End) -> None:
        """End every run."""
        for run in self._runs.values():
            run.finish(exit_code=int(how != "FINISHED"))

    def _run(self, unit: str) -> Any:
        if unit not in self._runs:
            config = self._config
            self._runs[unit] = self._library.init(
                project=self._project,
                id="-".join(filter(None, (self._id, unit))),
                name=unit or config.name,
                group=f"{config.name}-{self._id}",
                job_type="unit" if unit else "run",
                resume="allow",
                reinit="create_new",
                tags=[f"{key}:{value}"[:64] for key, value in config.tags.items()],
                config=config.model_dump(mode="json"),
                dir=str(config.directory),
                # One run per process records the machine and greets; the log is the run directory's.
                settings=self._library.Settings(console="off", silent=bool(unit), x_disable_stats=bool(unit)),
            )
        return self._runs[unit]
