"""Configurations that earlier versions stored still open; what a user writes is held to today's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.effects import leaves
from moedisco_ray.core.config.renamed import REMOVED, REMOVED_UNLESS_USED, RENAMED, stored_config, stored_settings
from moedisco_ray.core.errors import ConfigError, RunDirError
from moedisco_ray.core.records.run_report import current_report

STORED = json.loads(Path(__file__).with_name("stored_config.json").read_text())
LEAVES = {leaf.path for leaf in leaves(RunConfig)}


def test_a_configuration_of_an_earlier_version_opens_with_what_it_says() -> None:
    config = stored_config(STORED)
    assert (config.name, config.seed, config.tokens.total) == ("earlier", 3, 123_456)
    assert (config.submodels.sync_every, config.submodels.optimizer.lr) == (7, 0.002)
    assert (config.checkpoint.max_failures, config.finetune.keep_optimizer_state) == (5, False)
    assert (config.submodels.optimizer.precision, config.finetune.optimizer.precision) == ("pure_bf16", "bf16")
    assert config.merge.router == "random"
    assert config.tracking.trackers == {"wandb": "experiments"}
    assert stored_config(config.model_dump(mode="json")) == config


def test_it_is_refused_where_a_user_writes_it() -> None:
    with pytest.raises(ConfigError, match="no such setting"):
        check_config(STORED)


def test_the_table_names_what_is_gone_and_leads_to_what_exists() -> None:
    assert not LEAVES & {*REMOVED, *REMOVED_UNLESS_USED, *RENAMED}
    assert all(new in LEAVES or new.rpartition(".")[0] in LEAVES for new in RENAMED.values())
    assert stored_settings(dict.fromkeys((*REMOVED, *RENAMED), 1)) == dict.fromkeys(RENAMED.values(), 1)
    assert stored_settings(REMOVED_UNLESS_USED) == {}


@pytest.mark.parametrize(
    ("section", "setting", "value", "line"),
    [
        ("merge", "backbone", "ties", "merge.backbone: 'ties': must be 'uniform'"),
        ("merge", "router", "centroid", "merge.router: 'centroid': must be 'ridge'"),
        ("clusters", "overlap", 0.3, "clusters.overlap: no such setting; remove it"),
    ],
)
def test_a_stored_value_that_nothing_replaces_is_named_in_one_line(
    tmp_path: Path, section: str, setting: str, value: object, line: str
) -> None:
    stored = {**STORED, section: {**STORED[section], setting: value}}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(RunDirError) as refused:
        current_report(tmp_path)
    assert f"holds a run of another version ({line}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_is_gone_from_the_entries_of_a_list_is_left_out() -> None:
    minimal = {"name": "x", "corpus": {"sources": [{"path": "embedded", "weight": 2.0}]}}
    unseen = {"path": "s3://bucket/text", "name": "law"}
    stored = {**minimal, "evaluation": {"sources": [unseen | {"weight": 1.0, "owner": None}]}}
    assert stored_config(stored) == stored_config({**minimal, "evaluation": {"sources": [unseen]}})
    assert stored_config(stored).corpus.sources[0].weight == 2


def test_a_section_of_which_nothing_is_left_has_its_defaults() -> None:
    minimal = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}}
    assert stored_config({**minimal, "finetune": {"dense_gate": 0.5}}) == stored_config(minimal)


@pytest.mark.parametrize(("method", "vectors"), [("kmeans", "mean_token"), ("random", "random")])
def test_a_value_that_another_setting_took_over_is_found_there(method: str, vectors: str) -> None:
    minimal = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}}
    stored = {**minimal, "clusters": {"method": method, "vectors": "mean_token", "restarts": 2}}
    assert stored_config(stored) == stored_config({**minimal, "clusters": {"vectors": vectors}})
