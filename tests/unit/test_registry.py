"""Every entry of the registry can be imported and used, and a new one works without a change elsewhere."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import typer

from moedisco_ray.core import registry
from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.registry import (
    BACKBONE_RULES,
    COMMANDS,
    EXPORT_FORMATS,
    MODEL_FILES,
    ROUTER_METHODS,
    TRACKERS,
    Entry,
)
from moedisco_ray.stages.merge.backbone import BackboneRule, backbone_rule, combine, merge_weights
from moedisco_ray.stages.merge.router_init import directions, normalised, statistics

ENTRIES = [*COMMANDS, *EXPORT_FORMATS.values(), *TRACKERS.values(), *BACKBONE_RULES.values(), *ROUTER_METHODS.values()]
MINIMAL = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_names_something_that_can_be_used(entry: Entry) -> None:
    if (remedy := registry.missing(entry)) is not None:
        pytest.skip(remedy)
    assert isinstance(registry.load(entry), BackboneRule | typer.Typer) or callable(registry.load(entry))


def test_a_model_files_program_exists() -> None:
    root = Path(registry.__file__).parents[2]
    for kind in MODEL_FILES.values():
        assert root.joinpath(*kind.name.split(".")).with_suffix(".py").is_file()


def test_an_entry_whose_package_is_absent_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"^--to: 'x': needs the package absent; pip install 'moedisco-ray\[x\]'$"):
        registry.load(Entry("absent:write", ("absent",), "x"), "--to", "x")


def test_a_merge_rule_is_a_file_and_a_line_of_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy_rules")
    vars(module).update(
        MEDIAN=BackboneRule(tuple, lambda delta_CM, _: delta_CM.median(dim=0).values),
        means=lambda total, _: normalised(total.xy_DC.T / total.count_C[:, None], total),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(BACKBONE_RULES, "median", Entry("toy_rules:MEDIAN"))  # type: ignore[arg-type]
    monkeypatch.setitem(ROUTER_METHODS, "means", Entry("toy_rules:means"))  # type: ignore[arg-type]
    config = check_config(MINIMAL | {"merge": {"backbone": "median", "router": "means"}})
    assert config.merge.from_data(from_moe=True)
    weights = merge_weights(config.merge.backbone, [1, 1, 2])
    copies = [torch.tensor([value, 2.0]) for value in (1.0, 5.0, 9.0)]
    merged, _ = combine("norm", copies, torch.zeros(2), weights, backbone_rule(config.merge.backbone).change)
    assert merged.tolist() == [5.0, 2.0]
    x_TD, cluster_T = torch.eye(2, dtype=torch.float64).repeat(3, 1), torch.tensor([0, 1]).repeat(3)
    w_CD = directions(config.merge.router, statistics(x_TD, cluster_T, 2), 0)
    assert (x_TD @ w_CD.T).argmax(1).tolist() == cluster_T.tolist()


def test_a_name_without_an_entry_is_an_error_that_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"^merge.router: 'means': must be 'ridge'"):
        check_config(MINIMAL | {"merge": {"router": "means"}})
