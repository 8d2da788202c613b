"""Starts and stops drivers: writes and removes their files, submits and stops their Ray Jobs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.driver_proofs import ReportAddress
from moedisco_ray.core.store.locations import Location, is_uri
from service.database.tables import RunRow
from service.domain.datasets import hash_in, place_in
from service.domain.jobs import job_name, submission_id
from service.domain.path_sandbox import check_links, check_parts, sandboxed
from service.domain.run_paths import RunPaths, home_of
from service.domain.signatures import driver_key
from service.domain.starts import located
from service.driver_user import DriverUser
from service.ray_side.jobs import RayJobs, Submission
from service.run_homes import make_run_directory, open_home, write_in
from service.run_storage import documents_at
from service.settings import Settings


class Launcher:
    """Starts drivers and asks them to stop; every method is idempotent.

    Args:
        secret: Secret from which the drivers' keys are derived.
        location_of: Returns the path or URI of a run directory, or None for a deleted run; not asked for data sets.
        offers_of: Returns the paths or URIs of the runs from which a run may take stages.
    """

    def __init__(
        self,
        jobs: RayJobs,
        settings: Settings,
        secret: bytes,
        location_of: Callable[[str], Location | None],
        offers_of: Callable[[str], Sequence[str]],
    ) -> None:
        self._jobs = jobs
        self._settings = settings
        self._roots = settings.roots
        self._secret = secret
        self._location_of = location_of
        self._offers_of = offers_of
        self._user = None if settings.driver_user is None else DriverUser.named(settings.driver_user)

    def launch(self, run: RunRow) -> None:
        """Write the driver's configuration and submit the job of the run's current attempt.

        Raises:
            ConfigError: A path in the configuration is no longer allowed: the roots have changed, or there is a new
                symbolic link.
            OSError: The run's home cannot be written.
            RayUnavailable: It is unknown whether Ray accepted the job.
            UnusableRun: This version refuses the run's configuration.
        """
        place = RunPaths(Path(run.directory))
        config, read = self._allowed(run)
        with open_home(place.home, self._roots.homes, self._user) as home:
            write_in(home, place.request.name, json.dumps(config.model_dump(mode="json"), indent=2) + "\n", self._user)
            if self._user is not None and not is_uri(run.location):
                # The driver owns only the run directory; the service writes its files next to it.
                make_run_directory(home, place.directory.name, self._user)
            self._write_address(home, run)
        self._jobs.submit(
            Submission(
                id=submission_id(run.id, run.attempt),
                run=run.id,
                config_path=place.request,
                stop_file=place.stop_file(run.attempt),
                report_to=place.report_to(run.attempt),
                read_roots=self._roots.readable(*read, place.home, *([run.location] if is_uri(run.location) else ())),
                reuses=self._offers_of(run.id),
                functions=self._roots.functions,
                metadata={
                    "job_name": job_name(run.name, run.attempt),
                    "run": run.id,
                    "attempt": str(run.attempt),
                    "owner": run.owner,
                },
            )
        )

    def publish_address(self, run: RunRow) -> None:
        """Write the address to which the current attempt's driver reports, unless its file has this address.

        The file has another one after a restart at another port.

        Every driver can read its run's home, wherever Ray runs: its configuration and its stop file are there too.

        Raises:
            ConfigError: The service may not write to the run's home, so it cannot have started a driver there.
            OSError: The run's home cannot be read or written.
        """
        place = RunPaths(Path(run.directory))
        with contextlib.suppress(FileNotFoundError):
            if place.report_to(run.attempt).read_text(encoding="utf-8") == self._address(run).to_json():
                return
        with open_home(place.home, self._roots.homes, self._user) as home:
            self._write_address(home, run)

    def request_stop(self, run: RunRow) -> None:
        """Write the stop file of the run's current attempt.

        Raises:
            ConfigError: The service may not write to the run's home, so it cannot have started a driver there.
            OSError: The run's home cannot be written.
        """
        place = RunPaths(Path(run.directory))
        path = place.stop_file(run.attempt)
        if not path.exists():
            with open_home(place.home, self._roots.homes, self._user) as home:
                write_in(home, path.name, run.stop or "cancelled", self._user)

    def _address(self, run: RunRow) -> ReportAddress:
        key = driver_key(self._secret, run.id, run.attempt)
        names = tuple(run.config.get("secrets", ()))
        return ReportAddress(self._settings.report_url(run.id), run.attempt, key, names)

    def _write_address(self, home: int, run: RunRow) -> None:
        name = RunPaths(Path(run.directory)).report_to(run.attempt).name
        write_in(home, name, self._address(run).to_json(), self._user, mode=0o600)

    def _allowed(self, run: RunRow) -> tuple[RunConfig, Sequence[Location]]:
        """Check the paths again, as at submission, and replace run references by paths; see `located`."""
        run.check_repeatable()
        stored = run.settings
        output = home_of(home_of(run.location))
        storage = stored.checkpoint.storage if run.storage is None else str(home_of(run.storage))
        asked = stored.model_copy(
            update={
                "output": output if is_uri(output) else Path(os.path.realpath(output)),
                "checkpoint": stored.checkpoint.model_copy(update={"storage": storage}),
            }
        )
        check_links(sandboxed(asked, self._roots), self._roots)
        check_parts(stored, self._location_of)
        return located(stored, self._place_of, documents_at)

    def _place_of(self, key: str) -> Location | None:
        digest = hash_in(key)
        return self._location_of(key) if digest is None else place_in(self._roots.homes, digest)
