"""The quick benchmark, which CI runs: what counts as a failure."""

import argparse
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from benchmarks.study.quality import run as quality


@pytest.fixture
def compared(monkeypatch):
    """Replaces the comparison. As in a real one, joint training's row is the first."""
    def rows(default, paper):
        perplexity = {"joint": 9.0, "disco": default, "paper": paper}
        compare = Mock(return_value=SimpleNamespace(rows=[
            SimpleNamespace(arm=arm, perplexity=value) for arm, value in perplexity.items()]))
        monkeypatch.setattr(quality, "compare", compare)
        return compare

    monkeypatch.setattr(quality, "compare_view", Mock(return_value="a table"))
    monkeypatch.setattr(quality, "torch", SimpleNamespace(set_num_threads=Mock()))     # other tests keep their threads
    return rows


@pytest.mark.parametrize(("default", "paper", "code"), [
    (34.0, 100.0, 0), (60.0, 100.0, 0),
    (60.5, 100.0, 1), (99.0, 100.0, 1), (100.0, 100.0, 1), (130.0, 100.0, 1), (float("nan"), 100.0, 1)])
def test_a_default_that_does_not_win_clearly_fails(compared, tmp_path, capsys, default, paper, code):
    compare = compared(default, paper)
    assert quality.quick(argparse.Namespace(work=tmp_path)) == code
    assert ("LOSES" in capsys.readouterr().out) == (code == 1)
    (base, work, names), settings = compare.call_args
    sizes = base.model.architecture
    assert (sizes.num_experts_per_tok / sizes.num_experts, sizes.num_experts // base.cluster_count) == (0.125, 4)
    assert (work, names, settings["budgets"]) == (tmp_path / "quick", ["disco", "paper"], ("dollars",))
