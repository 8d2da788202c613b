"""Tokens read outside training: computed by hand, checked by laws, and compared with what models really get."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import OneCorpus, small_config
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.study.compare.accounting import (
    Reader,
    Reads,
    account,
    dollars_of,
    forward_flops,
    overheads,
    trained_tokens,
)
from benchmarks.study.compare.arms import ARMS, Arm, arm_config
from benchmarks.study.compare.reading import actual_reads, expected_reads
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.models.streamed import StoredEmbedding
from moedisco_ray.plan import build_plan

TOKENS = {"total": 8000, "seed_share": 0.25, "finetune_share": 0.25}
READINGS = st.dictionaries(
    st.sampled_from(["cluster", "merge", "evaluate"]),
    st.dictionaries(st.sampled_from(["whole", "whole_states", "submodel", "submodel_states"]), st.floats(0, 1e12)),
)


def config_of(output: Path, **changes: Any) -> RunConfig:
    return small_config(
        output,
        **{
            "tokens": TOKENS,
            "clusters": {"count": 2, "vectors": "hidden_state"},
            "merge": {"calibration_tokens": 1024},
            "evaluation": {"max_tokens": 3000, "every_tokens": 8000},
            **changes,
        },
    )


CONFIG = config_of(Path("runs"))
PLAN = build_plan(CONFIG)


def test_what_is_read_is_counted_by_hand() -> None:
    # Both layers: attention 2 (2 x 64 x 64 + 2 x 64 x 64) = 32,768, norms 2 (2 x 64 + 2 x 32) + 64 = 448; a head of 64
    # x 600. The MoE adds routers 2 x 2 x 64 = 256 and 2 x 2 experts of 3 x 64 x 128 = 24,576 each; a sub-model half of
    # both. A third of 6 N + 12 l h d L is 2 N + 4 x 2 x 64 x 64 = 2 N + 32,768.
    whole, submodel = (
        2 * (32_768 + 448 + 64 * 600 + 256 + 98_304) + 32_768,
        2 * (32_768 + 448 + 64 * 600 + 128 + 49_152) + 32_768,
    )
    head = 2 * 64 * 600
    assert forward_flops(CONFIG, PLAN) == {
        "whole": whole,
        "whole_states": whole - head,
        "submodel": submodel,
        "submodel_states": submodel - head,
    }
    cluster, merge, evaluate = overheads(
        CONFIG, PLAN, {"cluster": {"submodel": 50_000}, "merge": {"whole": 1536.5}, "evaluate": {"whole": 3000}}
    )
    assert (cluster.stage, cluster.pool, cluster.steps, cluster.tokens) == ("cluster", "low_memory", None, 50_000)
    assert cluster.flops == 50_000 * submodel
    # 312 TFLOP/s at 35 %; 0.72 of that for 0.35 dollars an hour, all of it for 2.28. Two workers share the documents.
    assert cluster.hours == pytest.approx(cluster.flops / (312e12 * 0.35 * 0.72) / 3600 / 2)
    assert cluster.dollars == pytest.approx(2 * cluster.hours * 0.35)
    assert merge.hours == pytest.approx(merge.flops / (312e12 * 0.35) / 3600)
    assert (merge.stage, merge.pool, merge.flops) == ("merge", "high_memory", 1536.5 * whole)
    assert evaluate.dollars == pytest.approx(3000 * whole / (312e12 * 0.35) / 3600 * 2.28)


def multiplied(tokens: Mapping[Reader, float], times: float) -> dict[Reader, float]:
    return {reader: times * count for reader, count in tokens.items()}


@given(READINGS, st.floats(0.1, 10))
def test_an_account_is_the_plan_and_what_is_read_in_proportion(reads: Reads, times: float) -> None:
    phases = account(CONFIG, PLAN, reads)
    assert trained_tokens(phases) == PLAN.tokens
    read = dollars_of(overheads(CONFIG, PLAN, reads))
    assert dollars_of(phases) == pytest.approx(PLAN.training_dollars + read)
    more: Reads = {stage: multiplied(tokens, times) for stage, tokens in reads.items()}
    assert dollars_of(overheads(CONFIG, PLAN, more)) == pytest.approx(times * read)
    order = ("seed", "cluster", "submodels", "merge", "finetune", "evaluate")
    assert [order.index(phase.stage) for phase in phases] == sorted(order.index(phase.stage) for phase in phases)


RATES = {"a": (0.1, 0.2), "b": (0.4, 0.5)}
"""Price and speed of two node types."""


def priced(**low_memory: Any) -> RunConfig:
    return config_of(Path("runs"), pools={"low_memory": low_memory, "high_memory": {"workers": 1}})


MIXED = priced(
    types=[
        {"name": name, "resource": f"{name}_gpu", "memory_gb": 24, "price_per_hour": price, "speed": speed}
        for name, (price, speed) in RATES.items()
    ]
)
ALIKE = [priced(price_per_hour=price, speed=speed) for price, speed in RATES.values()]


@given(READINGS)
def test_what_a_mixed_pool_reads_is_read_by_its_dearest_type(reads: Reads) -> None:
    assert dollars_of(overheads(MIXED, PLAN, reads)) == pytest.approx(
        max(dollars_of(overheads(config, PLAN, reads)) for config in ALIKE)
    )


class Counting(OneCorpus):
    """Counts the tokens that models get in each step."""

    def __init__(self) -> None:
        self.given: Counter[str] = Counter()

    def build_clusters(self, config: RunConfig, **settings: Any) -> dict[str, Any]:
        with self._counted("build_clusters"):
            return super().build_clusters(config, **settings)

    def call(self, pool: Any, emit: Any, stop: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._counted(function.__name__):
            return super().call(pool, emit, stop, function, *args, **kwargs)

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        def count(module: nn.Module, inputs: Any) -> None:
            if isinstance(module, nn.Embedding | StoredEmbedding):
                self.given[name] += inputs[0].numel()

        handle = register_module_forward_pre_hook(count)
        try:
            yield
        finally:
            handle.remove()


def run(config: RunConfig) -> Counter[str]:
    backend = Counting()
    pipeline.run(config, backend=backend)
    return backend.given


def close(ours: Reads, theirs: Reads, windows: int) -> bool:
    """Whether two counts are equal except for some calibration windows."""
    if ours.keys() != theirs.keys():
        return False
    margins = {stage: windows * 64 if stage == "merge" else 1e-9 for stage in ours}
    return all(tokens == pytest.approx(theirs[stage], abs=margins[stage]) for stage, tokens in ours.items())


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_as_much_is_counted_as_models_are_given(tmp_path: Path) -> None:
    config = config_of(tmp_path, merge={"calibration_tokens": 1024})
    given = run(config)
    reads = actual_reads(config, "finetune")
    assert reads["cluster"] == {"submodel_states": given["build_clusters"]}
    # Calibration of two layers looks the tokens up once, and passes through the first layer twice.
    assert given["merge_submodels"] == 1024
    assert reads["merge"] == {"whole_states": 1.5 * 1024}
    # The merged and the finished model; the seed; each sub-model on its own cluster, which the seed determines.
    held_out = read_json(config.directory / "evaluation" / "evaluation.json")
    assert held_out["stages"].keys() == {"seed", "merge", "submodels", "finetune"}
    cut = reads["evaluate"].pop("submodel_states")
    assert reads["evaluate"] == {"whole": 2 * held_out["tokens"], "submodel": 2 * held_out["tokens"]}
    counted = 4 * held_out["tokens"] + cut
    assert counted <= given["evaluate"] <= 1.4 * counted  # windows begin with what is before them, and are padded
    reads["evaluate"]["submodel_states"] = cut
    assert close(expected_reads(config, "finetune", config.directory / "corpus"), reads, windows=2 * 2)
    alone = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"stages": False})})
    assert expected_reads(alone, "finetune", config.directory / "corpus")["evaluate"] == {
        "whole": held_out["tokens"],
        "submodel_states": cut,
    }


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(("normalised", "passes"), [(True, 0), (False, 1.5)])
def test_upcycling_is_calibrated_where_a_scale_has_to_be_matched(
    tmp_path: Path, *, normalised: bool, passes: float
) -> None:
    base = config_of(tmp_path)
    base = base.model_copy(
        update={
            "model": base.model.model_copy(
                update={"config": base.model.architecture.model_copy(update={"norm_topk_prob": normalised})}
            )
        }
    )
    config = arm_config(base, "upcycle", ARMS["upcycle"], tmp_path, "tokens", 8000)
    assert run(config)["write_whole"] == 1024  # the run looks at its routers in any case
    reads = actual_reads(config, "finetune")
    assert reads == expected_reads(config, "finetune", config.directory / "corpus")
    assert reads["merge"] == {"whole_states": passes * 1024}


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_an_ensemble_asks_every_sub_model_and_weighs_them(tmp_path: Path) -> None:
    # which a model reads for, as tf-idf is not
    of_states = {**ARMS["ensemble"].settings, "clusters.vectors": "hidden_state"}
    arm = dataclasses.replace(ARMS["ensemble"], settings=of_states)
    config = arm_config(config_of(tmp_path), "ensemble", arm, tmp_path, "tokens", 8000)
    run(config)
    reads = actual_reads(config, "ensemble")
    tokens = read_json(config.directory / "evaluation" / "evaluation.json")["ensemble"]["tokens"]
    assert reads.keys() == {"cluster", "evaluate"}
    assert reads["evaluate"].keys() == {"submodel", "submodel_states"}
    # Contexts of at most a sequence's length, one per 64 tokens of a document; here 64 is the sequence's length.
    assert reads["evaluate"]["submodel"] == (2 + 2) * tokens  # the seed, and each sub-model on its own cluster, too
    assert 0 <= reads["evaluate"]["submodel_states"] <= 2 * tokens
    assert reads == expected_reads(config, "ensemble", config.directory / "corpus")


@pytest.mark.usefixtures("_one_thread")
def test_clusters_that_no_model_reads_for_cost_nothing(tmp_path: Path) -> None:
    base = config_of(tmp_path)
    config = arm_config(base, "joint", ARMS["joint"], tmp_path, "tokens", 8000)
    pipeline.run(config, backend=OneCorpus())
    corpus = config.directory / "corpus"
    plan = build_plan(base)

    def clustering(vectors: str) -> float:
        arm = Arm("", {"clusters.vectors": vectors})
        reads = expected_reads(arm_config(base, "disco", arm, tmp_path, "tokens", 8000), "finetune", corpus)
        return dollars_of(overheads(base, plan, {"cluster": reads["cluster"]}))

    for free in ("mean_token", "tfidf_svd", "random"):
        assert clustering(free) == 0
    assert clustering("hidden_state") > 0
