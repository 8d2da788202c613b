"""The agent of a spot node: it drains the Ray node when the cloud announces its end, which Ray does not do itself."""

from moedisco_ray.execution.clouds.metadata import Notice, Provider, Unavailable
from moedisco_ray.execution.node_agent.agent import find_provider, make_provider, watch
from moedisco_ray.execution.node_agent.raylets import Drainer, RayUnavailable

__all__ = ["Drainer", "Notice", "Provider", "RayUnavailable", "Unavailable", "find_provider", "make_provider", "watch"]
