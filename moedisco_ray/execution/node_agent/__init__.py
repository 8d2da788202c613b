"""What runs on every spot node: hears the cloud's notice and tells Ray, which on its own never does."""

from moedisco_ray.execution.node_agent.agent import watch
from moedisco_ray.execution.node_agent.metadata import Notice, Provider, ProviderName, Unavailable
from moedisco_ray.execution.node_agent.providers import find_provider, make_provider
from moedisco_ray.execution.node_agent.raylets import Drainer, RayAway

__all__ = ["Drainer", "Notice", "Provider", "ProviderName", "RayAway", "Unavailable", "find_provider", "make_provider", "watch"]
