"""Train Mixture-of-Experts language models mostly on cheap, low-memory GPUs, on Ray."""

__version__ = "0.1.0"
