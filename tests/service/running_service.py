"""The real application behind a real port, which is stopped and started while clients talk to it."""

import socket
import threading
import time

from reconciling import SECRET

from moedisco_ray.core.records.events import Event
from service.api.app import create_app
from service.api.server import Server
from service.client import Client, RetryPolicy

RETRY = RetryPolicy(seconds=30, first_wait=0.02, longest_wait=0.2)


class Running:
    """The application behind a port that stays the same while the server is stopped and started."""

    def __init__(self, made):
        self.made = made
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server, self.secret = None, SECRET

    def start(self):
        made = self.made
        app = create_app(
            made.settings,
            made.database,
            made.jobs,
            planning=made.planning,
            pools=made.pools,
            dashboard=made.dashboard,
            notifier=made.notifier,
            secret=self.secret,
            secrets_key=SECRET,
            wake_reconciler=lambda: None,
        )
        self.server = Server(app, made.settings.model_copy(update={"port": self.port}))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self):
        if self.server is not None:
            self.server.should_exit = True
            self.thread.join()
            self.server = None

    def client(self, who="ann", retry=RETRY):
        return Client(self.url, self.made.plain.get(who, who), retry=retry)

    def report(self, run_id, first, count):
        self.made.report(
            run_id,
            *(
                Event(
                    "progress",
                    "submodels",
                    "submodel-0",
                    {
                        "step": step,
                        "steps": 1000,
                        "tokens": 10 * step,
                        "loss": 3.0,
                        "lr": 0.1,
                        "grad_norm": 1.0,
                        "tokens_per_second": 5.0,
                    },
                    float(step),
                )
                for step in range(first, first + count)
            ),
        )


def until(happened, seconds=30):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)
