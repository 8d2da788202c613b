from __future__ import annotations

import os

import pytest
import torch


def pytest_runtest_setup() -> None:
    # Not a fixture: skips of fixtures are reported once for each test.
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products; cuBLAS reads it once


@pytest.fixture
def device() -> str:
    return "cuda"
