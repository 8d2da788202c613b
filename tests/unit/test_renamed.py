"""Configurations that earlier versions stored still open; what a user writes is held to today's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import small_config

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.config.effects import leaves
from moedisco_ray.core.config.renamed import (
    CONSTANTS,
    REMOVED,
    REMOVED_UNLESS_USED,
    RENAMED,
    gone_values,
    stored_config,
    stored_settings,
)
from moedisco_ray.core.errors import ConfigError, RunDirError
from moedisco_ray.core.records.run_report import current_report
from moedisco_ray.core.store.checksums import CHECKSUM
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.run_directory import check_directory

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


def test_values_that_no_run_can_have_any_more_are_named() -> None:
    """Before: they were dropped without a word."""
    assert set(CONSTANTS) <= REMOVED
    gate = "finetune.dense_gate 0.1 (now 0.0)"
    assert gone_values(STORED) == [gate]
    clusters = {**STORED["clusters"], "restarts": 8, "method": "random"}
    assert gone_values({**STORED, "clusters": clusters}) == ["clusters.restarts 8 (now 4)", gate]
    # Loads were matched where routers come from data.
    for router, matches in ((router, matches) for router in ("ridge", "random") for matches in (False, True)):
        merge = {**STORED["merge"], "router": router, "match_load": matches, "match_scale": router == "ridge"}
        assert len(gone_values({**STORED, "merge": merge})) == 1 + (matches != (router == "ridge"))


def test_a_run_with_such_a_value_is_read_and_not_continued(tmp_path: Path) -> None:
    """Before: the run was continued with the constant."""
    config = small_config(tmp_path)
    pipeline.claim(config, redo=False)
    (config.directory / "checkpoints" / "seed-x").mkdir(parents=True)
    path = config.directory / "config.json"
    stored = json.loads(path.read_text())
    del stored[CHECKSUM]
    for restarts in (4, 8):
        path.write_text(json.dumps({**stored, "clusters": {**stored["clusters"], "restarts": restarts}}))
        assert current_report(config.directory).name == config.name
        if restarts == 4:
            check_directory(config, redo=False)
            continue
        line = r"holds a run with other settings \(clusters\.restarts 8 \(now 4\)\); choose another name, or"
        with pytest.raises(RunDirError, match=line):
            check_directory(config, redo=False)
        check_directory(config, redo=True)


@pytest.mark.parametrize(("method", "vectors"), [("kmeans", "mean_token"), ("random", "random")])
def test_a_value_that_another_setting_took_over_is_found_there(method: str, vectors: str) -> None:
    minimal = {"name": "x", "corpus": {"sources": [{"path": "embedded"}]}}
    stored = {**minimal, "clusters": {"method": method, "vectors": "mean_token", "restarts": 2}}
    assert stored_config(stored) == stored_config({**minimal, "clusters": {"vectors": vectors}})
