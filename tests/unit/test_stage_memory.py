"""Plans of the stages that run text through a model without training it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from moedisco_ray.cli.display.plan import plan_view
from moedisco_ray.core.config import Architecture, RunConfig
from moedisco_ray.core.config.load import apply_override
from moedisco_ray.plan import GIB, InferencePlan, build_plan, too_large
from moedisco_ray.plan.stage_memory import StreamedModel, calibration_memory, scoring_memory, vectors_memory
from moedisco_ray.stages.calibration_text import spread

QWEN = {
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "vocab_size": 151_936,
}


def config(low: float = 24, high: float = 80, **sections: Any) -> RunConfig:
    base = {
        "name": "x",
        "corpus": {"sources": [{"path": "embedded"}]},
        "model": {"family": "qwen2_moe", "config": QWEN},
        "tokens": {"seed_share": 0.1},
        "clusters": {"count": 15},
        "pools": {
            "low_memory": {"gpu": 1, "memory_gb": low},
            "high_memory": {"gpu": 1, "memory_gb": high, "workers": 8},
        },
    }
    return RunConfig.model_validate(base | sections)


def by_stage(value: RunConfig) -> dict[str, InferencePlan]:
    return {each.stage: each for each in build_plan(value).inference}


def with_settings(value: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    raw = value.model_dump(mode="json")
    for setting in settings:
        apply_override(raw, setting)
    return RunConfig.model_validate(raw)


def text_of(value: RunConfig) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(plan_view(build_plan(value)))
    return capture.get()


def test_each_stage_is_planned_for_the_pool_that_runs_it() -> None:
    pools = {stage: (each.pool, each.pool_gb) for stage, each in by_stage(config()).items()}
    low, high = ("low_memory", 24), ("high_memory", 80)
    assert pools == {"cluster": low, "merge": high, "evaluate": high, "export": high}
    cheap = by_stage(config(finetune={"pool": "low_memory"}))
    assert {each.pool for each in cheap.values()} == {"low_memory"}
    alone = by_stage(
        config(tokens={"seed_share": 0, "finetune_share": 1}, clusters={"count": 15, "vectors": "tfidf_svd"})
    )
    assert list(alone) == ["evaluate", "export"]


def test_the_storage_table_has_the_same_memory() -> None:
    plan = build_plan(config())
    stored = {each.stage: each.device_memory for each in plan.storage}
    assert all(stored[each.stage] == each.memory.total for each in plan.inference)


def test_a_stage_that_does_not_fit_is_refused_and_its_remedy_makes_it_fit() -> None:
    small = config(low=12, high=6)
    plan = build_plan(small)
    found = by_stage(small)
    assert not plan.fits
    assert [stage for stage, each in found.items() if not each.fits] == ["evaluate"]
    remedy = found["evaluate"].remedy
    assert remedy is not None
    assert remedy.fits
    assert by_stage(with_settings(small, remedy.settings))["evaluate"].fits
    assert "! evaluate does not fit 6 GiB: fits with --set evaluation.max_tokens=" in text_of(small)
    assert any("a worker of evaluate needs" in str(stage.problem) for stage in too_large(plan))


def test_a_layer_that_is_larger_than_its_card_has_no_remedy() -> None:
    for stage in ("merge", "evaluate"):
        remedy = by_stage(config(high=1))[stage].remedy
        assert remedy is not None
        assert not remedy.fits
        assert "no setting makes it fit" in str(remedy)


def test_vectors_that_need_too_large_a_model_can_be_words() -> None:
    small = config(low=2)
    remedy = by_stage(small)["cluster"].remedy
    assert remedy is not None
    assert "cluster" not in by_stage(with_settings(small, remedy.settings))


def test_a_model_that_stays_loaded_has_all_weights_and_the_states_of_one_batch() -> None:
    sizes = Architecture(**{name: size for name, size in QWEN.items() if name != "vocab_size"})
    small, large = (StreamedModel("qwen2_moe", sizes, 151_936, gpu=1, memory_gb=size) for size in (24, 80))
    assert (small.stays, large.stays) == (False, True)
    for memory in (scoring_memory, vectors_memory):
        loaded, streamed = (memory(each, tokens=10**9, sequence_length=1024) for each in (large, small))
        assert loaded.weights > 20 * streamed.weights
        assert streamed.activations > 4 * GIB
    assert scoring_memory(large, tokens=10**9, sequence_length=1024).weights == 2 * (
        large.parameters.total - 2048 * 151_936
    )


def test_long_windows_make_no_larger_batches() -> None:
    model = StreamedModel("olmoe", Architecture(), 1000, gpu=1, memory_gb=24)
    short, long = (
        calibration_memory(model, tokens=2**20, sequence_length=length, clusters=2) for length in (1024, 8192)
    )
    assert short == long
    assert calibration_memory(model, tokens=2**20, sequence_length=2**16, clusters=2).activations > 2 * long.activations


@pytest.mark.parametrize("gpu", [0, 1])
def test_it_is_not_known_what_fits_a_cpu(gpu: int) -> None:
    value = config(pools={"low_memory": {"gpu": gpu}, "high_memory": {"gpu": gpu}})
    assert {each.fits_known for each in by_stage(value).values()} == {gpu > 0}
    host = {each.stage: each.worker_memory for each in build_plan(value).storage}
    assert (host["evaluate"] > 0) == (gpu == 0)


@pytest.mark.parametrize(("length", "windows"), [(64, 16), (1024, 16), (4096, 4), (65_536, 1)])
def test_batches_of_long_windows_are_small(length: int, windows: int) -> None:
    class Text:
        sequence_length = length

        def __len__(self) -> int:
            return 32

        def window(self, number: int) -> NDArray[np.int64]:
            return np.full(length + 1, number)

        def filled(self, number: int) -> int:
            return len(self.window(number))

    text: Any = Text()
    batches = spread(text, 32, 0)
    assert {tokens_BL.shape for tokens_BL, _ in batches} == {(windows, length)}
    assert sum(len(tokens_BL) for tokens_BL, _ in batches) == 32
