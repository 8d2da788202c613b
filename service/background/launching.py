"""What has to be on disk and in Ray for a run's driver to start or to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moedisco_ray.artifacts import write_json
from moedisco_ray.config import RunConfig
from service.database.tables import Run
from service.domain.confinement import Roots
from service.domain.jobs import job_name, submission_id
from service.domain.placement import Placement
from service.domain.signatures import driver_token
from service.domain.starts import located
from service.driver_user import DriverUser
from service.ray_side.jobs import Jobs, Submission
from service.settings import Settings


class Launcher:
    """Starts drivers and asks them to end. Everything here may be done again, with the same result.

    Args:
        jobs: Ray's.
        settings: Say where drivers report, and what they may read.
        secret: What their tokens are derived from.
        directory_of: The run directory of a run that another one starts from; None where it is gone.
    """

    def __init__(self, jobs: Jobs, settings: Settings, secret: bytes, directory_of: Callable[[str], Path | None]) -> None:
        self._jobs = jobs
        self._settings = settings
        self._roots = Roots(settings.input_roots, settings.output_roots, settings.storage_roots)
        self._secret = secret
        self._directory_of = directory_of
        self._user = None if settings.driver_user is None else DriverUser.named(settings.driver_user)

    def token(self, run_id: str, attempt: int) -> str:
        """What the driver of an attempt reports with."""
        return driver_token(self._secret, run_id, attempt)

    def launch(self, run: Run) -> None:
        """Write the driver's configuration and submit the job of the run's present attempt.

        Raises:
            OSError: The run's own directory cannot be written.
            RayUnavailable: Nobody can tell whether the job was taken.
        """
        place = Placement(Path(run.directory))
        place.home.mkdir(parents=True, exist_ok=True)
        config, read = located(RunConfig.model_validate(run.config), self._directory_of)
        write_json(place.request, config.model_dump(mode="json"))
        if self._user is not None:
            # Only the run directory is the driver's; what the service writes is next to it.
            place.directory.mkdir(exist_ok=True)
            self._user.give(place.directory)
            self._user.let_read(place.home)
            self._user.let_read(place.request)
        self._jobs.submit(Submission(
            id=submission_id(run.id, run.attempt),
            run=run.id,
            config_path=place.request,
            stop_file=place.stop_file(run.attempt),
            report_url=self._settings.report_url(run.id),
            token=self.token(run.id, run.attempt),
            read_roots=[*self._roots.directories, *read, place.home],
            metadata={"job_name": job_name(run.name, run.attempt), "run": run.id, "attempt": str(run.attempt), "owner": run.owner},
        ))

    def ask_to_end(self, run: Run) -> None:
        """Write the stop file of the run's present attempt.

        Raises:
            OSError: The run's own directory cannot be written.
        """
        path = Placement(Path(run.directory)).stop_file(run.attempt)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            # Complete as soon as it is there: the driver tells its content as the reason.
            draft = path.with_name(f".{path.name}.draft")
            draft.write_text(run.stop or "cancelled", encoding="utf-8")
            if self._user is not None:
                self._user.let_read(draft)
            draft.replace(path)
