"""Ray on hosts, as `ray start` makes it; every member of the Ray cluster needs the token."""

from __future__ import annotations

import json

from hosts import PYTHON, finished, until

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
_RAY = (PYTHON, "-m", "ray.scripts.scripts")
_LIST = """
import json, ray
ray.init('auto', log_to_driver=False, logging_level='ERROR')
print('NODES', json.dumps({n['NodeManagerAddress']: n['Resources'] for n in ray.nodes() if n['Alive']}))
"""


class RayOnHosts:
    """A Ray cluster on hosts.

    Args:
        hosts: The hosts.
        environment: Environment of Ray's processes, with the credentials of a store.
    """

    def __init__(self, hosts, environment=None):
        self._hosts = hosts
        self._environment = TOKEN | (environment or {})
        self._head = None

    def start(self, name, *, cpus, resources):
        """Start a host's Ray; the first one becomes the head."""
        address = self._hosts.address[name]
        place = (
            ["--head", "--port=6379", "--include-dashboard=false"]
            if self._head is None
            else [f"--address={self._hosts.address[self._head]}:6379"]
        )
        self._head = self._head or name
        code, output = finished(
            self._hosts.spawn(
                name,
                *_RAY,
                "start",
                *place,
                f"--node-ip-address={address}",
                f"--num-cpus={cpus}",
                "--num-gpus=0",
                f"--resources={json.dumps(resources)}",
                "--object-store-memory=200000000",
                **self._environment,
            ),
            300,
        )
        assert code == 0, output
        until(lambda: address in self.nodes(), 120, f"{name} in the Ray cluster")

    def nodes(self):
        """Address and resources of each node that lives."""
        code, output = finished(self._hosts.spawn(self._head, PYTHON, "-c", _LIST, **self._environment), 180)
        assert code == 0, output
        return json.loads(next(line for line in output.splitlines() if line.startswith("NODES")).removeprefix("NODES"))
