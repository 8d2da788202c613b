"""The check of a machine's GPUs before Ray starts there, with a made-up torch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from card_standin import NO_CUDA, TOO_OLD, write_torch

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.execution.cards import check_cards


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("too old", f"torch cannot use card 1 (NVIDIA L4) of node {socket.gethostname()}: {TOO_OLD} (torch 2.13.0 for"),
        ("missing", f"torch cannot use card 1 (NVIDIA L4) of node {socket.gethostname()}: {NO_CUDA} (torch 2.13.0 for"),
        ("wrong", "it computes -1 in place of 64"),
    ],
)
def test_the_card_that_fails_is_named(failure: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_torch(tmp_path / "path", failure, card=1)))
    check_cards("GPU", 1)
    with pytest.raises(ConfigError) as failed:
        check_cards("GPU", 2)
    assert str(failed.value).startswith("GPU: 2: ")
    assert says in str(failed.value)
    assert "or set GPU=0" in str(failed.value)


def test_a_card_that_never_answers_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(write_torch(tmp_path / "path", "hangs")))
    with pytest.raises(ConfigError, match=r"^GPU: 1: torch does not finish a small product .* within 2 s; restart"):
        check_cards("GPU", 1, seconds=2.0)


def test_a_torch_that_cannot_be_imported_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text('raise OSError("libcudart.so.13: cannot open shared object file")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"torch cannot start on node .*: OSError: libcudart\.so\.13: cannot open"):
        check_cards("GPU", 1)
    check_cards("GPU", 0)
