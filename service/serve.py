"""The service as one process: database, Ray, background work, and uvicorn in front of them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from service.background.deliveries import Deliveries
from service.background.housekeeping import Housekeeping
from service.background.launching import service_secret
from service.background.loop import Loop
from service.background.outgoing import Outgoing
from service.background.reconciler import Reconciler
from service.bootstrap import first_token
from service.database import audit, policies, runs, sessions, tokens
from service.database.session import Database
from service.domain.states import ACTIVE
from service.driver_user import DriverUser
from service.notifier import Notifier
from service.observability import configure_logging
from service.policies_file import load_policies
from service.process import alone, close_to_others
from service.ray_side.dashboard import Dashboard
from service.ray_side.jobs import RayJobs
from service.ray_side.local import LocalRay
from service.ray_side.pools import RayPools
from service.settings import Settings, check_bind

RECONCILE_SECONDS = 1.0
DELIVER_SECONDS = 1.0
TIDY_SECONDS = 600.0
KEEP_RAY_SECONDS = 15.0


@dataclasses.dataclass(frozen=True)
class Announcement:
    """What whoever started the service wants to know once it listens.

    Attributes:
        url: Of the service and its page.
        token: The first administrator's token; None: it is no longer valid, or its file was deleted.
        token_file: The file of that token.
        sign_in_code: A code that signs one browser in with that token; None where there is no token.
    """

    url: str
    token: str | None = dataclasses.field(repr=False)
    token_file: Path
    sign_in_code: str | None = dataclasses.field(repr=False)


def serve(settings: Settings, announce: Callable[[Announcement], None]) -> bool:
    """Serve until SIGINT or SIGTERM.

    Args:
        settings: What the operator set; port 0 takes a free one.
        announce: Called once the service listens.

    Returns:
        Whether a local Ray goes on, because runs are under way; the next start takes it and them up.

    Raises:
        ConfigError: A policies file that cannot be used, a public address without a valid token, a token file that holds none, a
            port that another program has, a state directory that another service uses.
        DatabaseError: The database cannot be used.
        RayUnavailable: The local Ray cluster did not start.
    """
    configure_logging(settings.log_format)
    raise_descriptor_limit()
    close_to_others(settings.state_dir)
    with contextlib.ExitStack() as stack:
        tell = stack.enter_context(alone(settings.state_dir))
        database = stack.enter_context(contextlib.closing(Database(settings.database)))
        database.migrate()
        token = first_token(database, settings.admin_token_path)
        with database.read() as session:
            check_bind(settings, tokens=tokens.count_valid(session, time.time()))
        _store_policies(settings, database)
        listener = stack.enter_context(_listen(settings))
        settings = settings.model_copy(update={"port": listener.getsockname()[1]})
        local, jobs, dashboard = _ray(settings)
        stack.enter_context(contextlib.closing(jobs))
        stack.enter_context(contextlib.closing(dashboard))

        def listening() -> None:
            announce(Announcement(settings.url, token, settings.admin_token_path, _sign_in_code(database, token)))
            tell(settings.url)

        with contextlib.ExitStack() as kept:
            if settings.is_local:
                # Estimates say "unknown" until it is done; nothing waits for it.
                threading.Thread(target=measure, name="probe", daemon=True).start()
            if local is not None:
                keeper = Loop(local.ensure_running, KEEP_RAY_SECONDS, "local ray")
                keeper.start()
                kept.callback(keeper.stop)
            _work(settings, database, RayJobs(jobs), dashboard, listener, listening)
        return local is not None and not _end_idle(local, database)


def _sign_in_code(database: Database, token: str | None) -> str | None:
    if token is None:
        return None
    now = time.time()
    with database.write() as session:
        row = tokens.find(session, token, now)
        return None if row is None else sessions.create_code(session, row.id, now)


def _work(
    settings: Settings, database: Database, jobs: RayJobs, dashboard: Dashboard, listener: socket.socket,
    announce: Callable[[], None],
) -> None:
    """Everything between the start and the signal that ends it."""
    pools, notifier = RayPools(dashboard), Notifier()
    deliveries = Deliveries(database, Outgoing(allow_private=settings.allow_private_webhooks))
    reconciler = Reconciler(database, jobs, pools, notifier, settings, service_secret(settings.state_dir))
    housekeeping = Housekeeping(database, jobs, settings.output_roots, settings.session_idle_seconds)
    loops = (
        reconciling := Loop(reconciler.round, RECONCILE_SECONDS, "reconciler"),
        Loop(deliveries.round, DELIVER_SECONDS, "deliveries"),
        Loop(housekeeping.round, TIDY_SECONDS, "housekeeping"),
    )
    app = create_app(settings, database, jobs, pools, dashboard, notifier, reconciling.wake)
    server = Server(app, settings)
    with contextlib.ExitStack() as stack:
        stack.callback(deliveries.close)
        for loop in loops:
            loop.start()
            stack.callback(loop.stop)
        # The socket listens already: who comes now waits the moment until uvicorn answers.
        announce()
        with _ended_by_signals():
            server.run(sockets=[listener])


def _store_policies(settings: Settings, database: Database) -> None:
    """Put the operator's policies file, if one is named, in place of the stored policies."""
    if settings.policies is None:
        return
    wanted, now = load_policies(settings.policies), time.time()
    with database.write() as session:
        # As plain data: an entry that sets what the default says differs from one that leaves it out.
        before, after = (each.model_dump(mode="json", exclude_unset=True) for each in (policies.load(session), wanted))
        if before == after:
            return
        policies.replace(session, wanted, now)
        audit.note(
            session, owner="operator", token_id=None, action="policies.set", target="policies", address=None, now=now,
            detail={"file": str(settings.policies), **after})


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Leave the block at SIGINT and SIGTERM, with everything else still to be ended in order.

    uvicorn raises the signal that ended it once more, and SIGTERM's own way is to end the process at once.
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
            remedy = "another program listens there; choose another with --port" if error.errno == errno.EADDRINUSE else str(error)
            raise ConfigError("--port", settings.port, remedy) from error
        yield listener


def _ray(settings: Settings) -> tuple[LocalRay | None, Dashboard, Dashboard]:
    """The local Ray if one is needed, the client that submits jobs, and the client that reads everything else."""
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
        remedy = "is for a local Ray; drivers on a cluster run as the user who started its Ray"
        raise ConfigError("--driver-user", user.name, remedy)
    if not address.startswith(("http://", "https://")):
        raise ConfigError("--ray-address", address, "must be the URL that takes jobs, such as http://HEAD:8265")
    return None, Dashboard(address), Dashboard(settings.dashboard_url or address)


def _end_idle(local: LocalRay, database: Database) -> bool:
    """End the local Ray if nobody needs it; returns whether it was ended."""
    with database.read() as session:
        busy = bool(runs.in_states(session, list(ACTIVE)))
    if not busy:
        local.stop()
    return not busy
