from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study.compare.arms import ARMS, arm_config
from benchmarks.study.recipe import recipe
from moedisco_ray.core.config import RunConfig


@pytest.fixture
def base(tmp_path: Path) -> RunConfig:
    books = tmp_path / "books"
    books.mkdir()
    sources = [{"path": "embedded"}, {"path": str(books)}, {"path": str(tmp_path), "name": "novels"}]
    return RunConfig(name="small", corpus={"sources": sources}, output=tmp_path)


@pytest.mark.parametrize(
    ("arm", "there", "not_there"),
    [
        ("joint", {"tokens.seed_share": 0.0, "finetune.pool": "high_memory"}, ("clusters.", "merge.", "submodels.")),
        (
            "upcycle",
            {"clusters.count": 4, "submodels.optimizer.lr": 1e-3},
            ("clusters.vectors", "merge.", "submodels.sync_every"),
        ),
        ("disco", {"clusters.vectors": "hidden_state", "submodels.sync_every": None}, ("submodels.outer.",)),
        ("ensemble", {"tokens.finetune_share": 0.0}, ("finetune.",)),
    ],
)
def test_a_recipe_holds_what_has_a_say(
    base: RunConfig, tmp_path: Path, arm: str, there: dict, not_there: tuple
) -> None:
    found = recipe(arm_config(base, arm, ARMS[arm], tmp_path, "tokens", 1_000_000))
    assert found.items() >= there.items()
    assert not [path for path in found if path.startswith(not_there)]


def test_a_recipe_is_the_same_at_every_size_on_all_machines_with_any_seed(base: RunConfig) -> None:
    other = base.model_copy(
        update={
            "seed": 7,
            "tokens": base.tokens.model_copy(update={"total": 1_000_000_000}),
            "submodels": base.submodels.model_copy(
                update={"optimizer": base.submodels.optimizer.model_copy(update={"micro_batch": 1})}
            ),
        }
    )
    assert recipe(other) == recipe(base)
    assert recipe(other.model_copy(update={"merge": base.merge.model_copy(update={"router": "random"})})) != recipe(
        base
    )


def test_an_upcycled_seed_is_rescaled_only_where_the_weights_of_the_chosen_experts_do_not_sum_to_one(
    base: RunConfig, tmp_path: Path
) -> None:
    sizes = base.model.architecture.model_copy(update={"norm_topk_prob": False})
    other = base.model_copy(update={"model": base.model.model_copy(update={"config": sizes})})
    scale = {"merge.router", "merge.calibration_tokens"}
    assert recipe(arm_config(other, "upcycle", ARMS["upcycle"], tmp_path, "tokens", 1_000_000)).keys() >= scale
    assert not recipe(arm_config(base, "upcycle", ARMS["upcycle"], tmp_path, "tokens", 1_000_000)).keys() & scale
    assert not recipe(arm_config(other, "joint", ARMS["joint"], tmp_path, "tokens", 1_000_000)).keys() & scale
