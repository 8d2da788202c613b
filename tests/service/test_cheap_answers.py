"""What keeps answers quick: not to be measured here, but to be seen."""

import contextlib
import socket
import threading

from api_client import service
from databases import insert_run
from reconciling import SECRET
from running_service import until
from sqlalchemy import inspect

from service.api.app import create_app
from service.api.server import Server
from service.database import run_list
from service.domain.run_list import Selection


def test_the_body_of_an_answer_does_not_wait_until_its_head_is_acknowledged(tmp_path):
    with service(tmp_path) as made, contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        app = create_app(
            made.settings,
            made.database,
            made.jobs,
            planning=made.planning,
            pools=made.pools,
            dashboard=made.dashboard,
            notifier=made.notifier,
            secret=SECRET,
            secrets_key=SECRET,
            wake_reconciler=lambda: None,
        )
        server = Server(app, made.settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        until(lambda: server.started)
        nodelay = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)  # which accepted connections inherit
        server.should_exit = True
        thread.join()
    assert nodelay


def test_a_page_of_runs_leaves_out_what_it_does_not_show(database):
    made = insert_run(database)
    with database.read() as session:
        [found], _ = run_list.page(session, Selection(), limit=50)
        assert inspect(found).unloaded == {"config", "meter"}
        assert found.config == made.config
