"""Cards as they are: the table, what a pool takes from it, and the precision that `auto` means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moedisco_ray.core.cards import CARDS, find_card
from moedisco_ray.core.config import LowMemoryPool, Optimizer, RunConfig, check_config
from moedisco_ray.core.config.load import with_files
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.stages import training_stage
from moedisco_ray.plan import build_plan
from moedisco_ray.plan.resolve import resolve
from moedisco_ray.stages.train.jobs import recipe_of
from moedisco_ray.training.sharding import check_arithmetic

CLUSTER_FILES = Path(__file__).resolve().parents[2] / "cluster_yaml"


def config(card: str | None, **changes: Any) -> RunConfig:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    raw["pools"]["low_memory"] |= {"card": card}
    raw["submodels"]["optimizer"] |= changes
    return check_config(raw)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_finds_itself_and_reaches_a_part_of_its_peak(card: Any) -> None:
    assert find_card(card.name) is card
    assert 0 < card.mfu.moe <= card.mfu.dense < 1
    assert card.memory_gb < 200
    assert card.flops(moe=True) <= card.flops(moe=False) < card.tflops * 1e12


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("H100-NVL", "H100 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("RTX-4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti SUPER"),
        ("nvidia geforce rtx 4070 ti", "RTX 4070 Ti"),
    ],
)
def test_names_of_cuda_and_of_cluster_files_are_found(name: str, card: str) -> None:
    found = find_card(name)
    assert found is not None
    assert found.name == card


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA GeForce RTX 4070 SUPER",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "NVIDIA GeForce RTX 4070 Ti SUPER Laptop",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10-24Q",
    ],
)
def test_a_variant_without_a_row_is_not_the_plain_card(name: str) -> None:
    """Before: each had the memory and the speed of the desktop card, or of the whole one."""
    assert find_card(name) is None


def test_every_card_of_a_cluster_file_is_known_and_has_bf16() -> None:
    """Azure has no small card with bf16 that runs with the driver of its image."""
    for path in CLUSTER_FILES.glob("*/spot.yaml"):
        for node in yaml.safe_load(path.read_text())["metadata"]["moedisco"]["node_types"].values():
            card = find_card(node["gpu"]) if "gpu" in node else None
            assert "gpu" not in node or card is not None, path
            assert card is None or card.bf16 or (path.parent.name, card.name) == ("azure", "T4"), path


def test_a_pool_takes_memory_and_speed_of_its_card_unless_they_are_stated() -> None:
    pool = LowMemoryPool(gpu=1, card="L4")
    assert pool.memory_gb == 22.05
    assert pool.flops(1) == pytest.approx(121e12 * 0.30)
    assert pool.flops(4) == pytest.approx(121e12 * 0.15)
    stated = LowMemoryPool(gpu=1, card="RTX-4090", memory_gb=20, speed=0.5)
    assert (stated.card, stated.memory_gb, stated.speed) == ("RTX 4090", 20, 0.5)
    again = LowMemoryPool.model_validate(pool.model_dump())
    assert again == pool


@pytest.mark.parametrize(
    ("low", "words"),
    [
        ({"card": "L4", "memory_gb": 24}, "memory_gb 24 is more than a L4 has, 22.05"),
        ({"card": "Voodoo2"}, "Voodoo2 is none of the known cards"),
    ],
)
def test_a_card_that_cannot_be_is_refused(low: dict[str, Any], words: str) -> None:
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    raw["pools"]["low_memory"] |= low
    with pytest.raises(ConfigError, match=words):
        check_config(raw)


def test_auto_is_fp32_on_cards_without_bf16_in_the_plan_and_in_the_run() -> None:
    old, new = config("T4"), config("L4")
    assert recipe_of(old, training_stage("submodels")).precision == "fp32"
    assert recipe_of(new, training_stage("submodels")).precision == "auto"
    slow, fast = (build_plan(each) for each in (old, new))
    assert slow.stages[0].cost.worker_hours > 14 * fast.stages[0].cost.worker_hours  # 8.1 TFLOP/s against 121
    assert slow.stages[0].memory.activations > 1.5 * fast.stages[0].memory.activations or slow.stages[0].choice
    assert any("as it has no bf16" in speed.source for speed in slow.speeds)
    assert any("T4 has no bf16" in remark for remark in resolve(old).remarks())
    assert not any("bf16" in remark for remark in resolve(new).remarks())


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_bf16_on_a_card_without_it_is_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match=r"submodels.optimizer.precision: .*T4 has no bf16; set it to fp32 or auto"):
        with_files(config("T4", precision=precision), recorded=False)


@pytest.mark.parametrize(("capability", "precision"), [((8, 0), "auto"), ((7, 5), "fp32")])
def test_a_training_computes_in_what_its_card_has(
    capability: tuple[int, int], precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    check_arithmetic(Optimizer(precision=precision), "cuda:0")
    check_arithmetic(Optimizer(precision="bf16"), "cpu")


def test_a_training_in_bf16_does_not_start_on_a_card_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 \(compute capability 7.5\) has no bf16; name the card in pools"):
        check_arithmetic(Optimizer(), "cuda:0")
