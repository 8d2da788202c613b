"""TensorBoard: files in the run directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

from moedisco_ray.cli.series import RUN, Points, parameters, plain
from moedisco_ray.cli.tracking import End
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.run_record import RunReport


def open_tracker(config: RunConfig, project: str | Literal[True], setting: str) -> TensorBoard:
    """TensorBoard has no projects, and is wanted or not."""
    from torch.utils import tensorboard

    if project is not True:
        raise ConfigError(setting, project, "must be true: its files are in RUN_DIR/tensorboard, without projects")
    return TensorBoard(config, tensorboard)


class TensorBoard:
    """Writes to RUN_DIR/tensorboard, as one TensorBoard run per unit, so that units share a chart."""

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

    def results(self, report: RunReport, figures: Sequence[Path]) -> None:
        """Log samples and figures."""
        from matplotlib.image import imread

        writer = self._writer(RUN)
        for sample in report.samples:
            writer.add_text(f"samples/{plain(sample.prompt)}", f"**{sample.prompt}**{sample.text}")
        for figure in figures:
            writer.add_image(f"figures/{figure.stem}", imread(figure), dataformats="HWC")
        for each in self._writers.values():
            each.flush()  # a run at a URI uploads the files next

    def end(self, how: End) -> None:
        """Flush and close every file."""
        del how
        for writer in self._writers.values():
            writer.close()

    def _writer(self, unit: str, position: int | None = None) -> Any:
        # Open writers on first use: the run directory is claimed only when the run starts.
        if unit not in self._writers:
            # A resumed unit repeats what it did after its last checkpoint: the points that an earlier attempt wrote
            # there go.
            self._writers[unit] = self._library.SummaryWriter(
                str(self._config.directory / "tensorboard" / unit), purge_step=position if unit else None
            )
        return self._writers[unit]
