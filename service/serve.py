"""Runs the service in one process: database, Ray, background loops, and uvicorn."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.machine import measure
from service.api.app import create_app
from service.api.limits import raise_descriptor_limit
from service.api.server import Server
from service.background.end_messages import EndMessages
from service.background.housekeeping import Housekeeping
from service.background.leasing import TERM_SECONDS, BackgroundLease, replica_name
from service.background.loop import Loop
from service.background.notices import Notices
from service.background.reconciler import Reconciler
from service.bootstrap import first_token, secrets_key, service_secrets, show_messages_secret, without_password
from service.database import audit, leases, policies, runs, sessions, tokens
from service.database.session import Database
from service.domain.states import ACTIVE
from service.driver_user import DriverUser
from service.errors import DatabaseError
from service.notifier import Notifier
from service.observability import PrometheusMetrics, configure_logging
from service.planning.pool import PlanningPool
from service.policies_file import load_policies
from service.process import locked, make_private
from service.ray_side.dashboard import Dashboard
from service.ray_side.jobs import RayJobs
from service.ray_side.local import LocalRay
from service.ray_side.pools import RayPools
from service.settings import Settings, check_bind

RECONCILE_SECONDS = 1.0
"""Interval at which runs are compared with their jobs, in seconds."""
POST_SECONDS = 1.0
"""Interval at which messages about runs that have ended are posted, in seconds."""
TIDY_SECONDS = 600.0
"""Interval at which housekeeping applies retention and removes leftovers, in seconds."""
CHECK_RAY_SECONDS = 15.0
"""Interval at which the local Ray is checked, in seconds. It is started again if it has died."""


@dataclasses.dataclass(frozen=True)
class Announcement:
    """Facts about the service once it listens, for the person who started it.

    Attributes:
        url: URL of the service and its page.
        token: Token of the first administrator; None if it is no longer valid or its file was deleted.
        token_file: File of that token.
        sign_in_code: Code that signs one browser in with that token; None without a token.
    """

    url: str
    token: str | None = dataclasses.field(repr=False)
    token_file: Path
    sign_in_code: str | None = dataclasses.field(repr=False)


def serve(settings: Settings, announce: Callable[[Announcement], None]) -> bool:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: Settings of the service; port 0 takes a free port.
        announce: Called once the service listens.

    Returns:
        Whether a local Ray keeps running because runs are active; the next start connects to it again.

    Raises:
        ConfigError: The policies file or the token file is not valid, the address is public but no token is valid, or
            another program uses the port or the state directory.
        DatabaseError: The database cannot be used.
        RayUnavailable: The local Ray cluster did not start.
    """
    configure_logging(settings.log_format)
    raise_descriptor_limit()
    make_private(settings.state_dir)
    with contextlib.ExitStack() as stack:
        record_url = stack.enter_context(locked(settings.state_dir))
        database = stack.enter_context(contextlib.closing(Database(settings.database)))
        database.migrate()
        token = first_token(database, settings.admin_token_path)
        with database.read() as session:
            check_bind(settings, tokens=tokens.count_valid(session, time.time()))
        _store_policies(settings, database)
        lease = BackgroundLease(database, replica_name(settings.state_dir))
        if settings.is_local:
            _refuse_another_ray(settings, database, lease)
        listener = stack.enter_context(_listen(settings))
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        local, jobs, dashboard = _ray(settings)
        if local is not None:  # its start may take longer than the term of the lease
            with contextlib.ExitStack() as refused:
                refused.callback(local.stop)
                _refuse_another_ray(settings, database, lease)
                refused.pop_all()
        stack.enter_context(contextlib.closing(jobs))
        stack.enter_context(contextlib.closing(dashboard))

        def listening() -> None:
            announce(Announcement(settings.url, token, settings.admin_token_path, _sign_in_code(database, token)))
            record_url(settings.url)

        with contextlib.ExitStack() as loops:
            if settings.is_local:
                # A thread measures the machine; until it is done, estimates are "unknown".
                threading.Thread(target=measure, name="probe", daemon=True).start()
            if local is not None:
                checking = Loop(functools.partial(local.ensure_running, dashboard), CHECK_RAY_SECONDS, "local ray")
                checking.start()
                loops.callback(checking.stop)
            _run(settings, database, lease, RayJobs(jobs), dashboard, listener=listener, announce=listening)
        return local is not None and not _stop_if_idle(local, database)


def _sign_in_code(database: Database, token: str | None) -> str | None:
    if token is None:
        return None
    now = time.time()
    with database.write() as session:
        row = tokens.find(session, token, now)
        return None if row is None else sessions.create_code(session, row.id, now)


def _run(
    settings: Settings,
    database: Database,
    lease: BackgroundLease,
    jobs: RayJobs,
    dashboard: Dashboard,
    *,
    listener: socket.socket,
    announce: Callable[[], None],
) -> None:
    """Run the background loops and the server until a signal ends them."""
    pools, notifier, prometheus = RayPools(dashboard), Notifier(), PrometheusMetrics()
    secrets, key = service_secrets(database, settings.state_dir), secrets_key(settings.secrets_key_path)
    prometheus.lease.set_function(lambda: float(lease.held))
    reconciler = Reconciler(lease.renewing(), jobs, pools, notifier, settings=settings, secret=secrets.drivers)
    housekeeping = Housekeeping(lease.checking(), jobs, settings.roots, settings.session_idle_seconds)
    loops = [
        reconciling := Loop(lease.rounds(reconciler.round), RECONCILE_SECONDS, "reconciler"),
        Loop(lease.while_held(housekeeping.round), TIDY_SECONDS, "housekeeping"),
    ]
    if settings.webhook_url is not None:
        show_messages_secret(settings.state_dir, secrets.messages)
        messages = EndMessages(
            database,
            settings.webhook_url,
            secrets.messages,
            count=lambda answer: prometheus.messages.labels(answer).inc(),
            check=lease.check,
        )
        loops.append(Loop(lease.while_held(messages.round), POST_SECONDS, "end messages"))
    noticing = Notices(database, key, settings.url, check=lease.check)
    loops.append(Loop(lease.while_held(noticing.round), POST_SECONDS, "notices"))
    with contextlib.ExitStack() as stack:
        lease.acquire()
        stack.callback(_release, lease)
        planning = stack.enter_context(contextlib.closing(PlanningPool()))
        app = create_app(
            settings,
            database,
            jobs,
            planning=planning,
            pools=pools,
            dashboard=dashboard,
            notifier=notifier,
            secret=secrets.drivers,
            secrets_key=key,
            wake_reconciler=reconciling.wake,
            loops=lambda: {loop.name: loop.state for loop in loops},
            prometheus=prometheus,
        )
        server = Server(app, settings)
        for loop in loops:
            loop.start()
            stack.callback(loop.stop)
        # The socket already listens: requests wait until uvicorn answers.
        announce()
        with _ended_by_signals():
            server.run(sockets=[listener])


def _refuse_another_ray(settings: Settings, database: Database, lease: BackgroundLease) -> None:
    """Refuse to start a local Ray while another replica works with this database: it would lose all its runs.

    Raises:
        ConfigError: Another replica holds the lease of the background work for longer than its term.
    """
    deadline = time.monotonic() + TERM_SECONDS + 1
    while not lease.acquire():
        if time.monotonic() > deadline:
            with database.read() as session:
                name = leases.holder(session, leases.LEASE)
            remedy = f"another replica ({name}) works with this database; start both with the same --ray-address"
            raise ConfigError("--database-url", without_password(settings.database), remedy)
        time.sleep(RECONCILE_SECONDS)


def _release(lease: BackgroundLease) -> None:
    with contextlib.suppress(DatabaseError):  # the lease ends by itself
        lease.release()


def _store_policies(settings: Settings, database: Database) -> None:
    """Replace the stored policies with the policies file, if the settings name one."""
    if settings.policies is None:
        return
    wanted, now = load_policies(settings.policies), time.time()
    with database.write() as session:
        # Compare the policies as plain data, because setting a field to its default value is different from omitting
        # it.
        before, after = (each.model_dump(mode="json", exclude_unset=True) for each in (policies.load(session), wanted))
        if before == after:
            return
        policies.replace(session, wanted, now)
        audit.note(
            session,
            owner="operator",
            token_id=None,
            action="policies.set",
            target="policies",
            address=None,
            now=now,
            detail={"file": str(settings.policies), **after},
        )


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave the block at SIGINT or SIGTERM, so that the rest of the service is stopped properly.

    When a signal stops uvicorn, uvicorn raises it again, and the default action of SIGTERM would end the process at
    once.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _listen(settings: Settings) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
            listener.listen(2048)
        except OSError as error:
            remedy = (
                "another program uses it; choose another with --port" if error.errno == errno.EADDRINUSE else str(error)
            )
            raise ConfigError("--port", settings.port, remedy) from error
        yield listener


def _ray(settings: Settings) -> tuple[LocalRay | None, Dashboard, Dashboard]:
    """The local Ray (None if the settings name another cluster), the client for jobs, and the client for the rest."""
    address = settings.ray_address or settings.dashboard_url
    user = None if settings.driver_user is None else DriverUser.named(settings.driver_user)
    if address is None:
        if user is not None:
            user.check()
        local = LocalRay(settings.state_dir, user=user)
        cluster = local.start()
        dashboard = Dashboard(cluster.dashboard_url, cluster.token_path)
        return local, dashboard, dashboard
    if user is not None:
        remedy = "works only with a local Ray; on a cluster, drivers run as the user who started its Ray"
        raise ConfigError("--driver-user", user.name, remedy)
    if not address.startswith(("http://", "https://")):
        raise ConfigError("--ray-address", address, "must be the URL that accepts jobs, such as http://HEAD:8265")
    return None, Dashboard(address), Dashboard(settings.dashboard_url or address)


def _stop_if_idle(local: LocalRay, database: Database) -> bool:
    """Stop the local Ray unless runs are active; returns whether it was stopped."""
    with database.read() as session:
        busy = bool(runs.in_states(session, list(ACTIVE)))
    if not busy:
        local.stop()
    return not busy
