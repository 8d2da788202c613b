"""Peak memory of calibrating and evaluating published checkpoints, at their true shapes, against the plan.

Experts take the path of GPUs. `make test-fake` runs all cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_steps import PUBLISHED, SEQUENCE, HostCopies, InferenceBytes, path_of_gpus
from moe_models import top_k_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, masking_utils

from moedisco_ray.core.config import FAMILIES, Architecture, FamilyName
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.limits import BATCH_TOKENS, GPU_STATES, VECTOR_TOKENS
from moedisco_ray.models import canonical_shapes, hf_config, layer_stream, specialise, streamed
from moedisco_ray.models.layer_stream import layer_step
from moedisco_ray.models.streamed import streamed_model
from moedisco_ray.plan.memory import GIB, Memory
from moedisco_ray.plan.stage_memory import (
    StreamedModel,
    calibration_memory,
    layer_bytes_per_token,
    scoring_memory,
    vectors_memory,
)
from moedisco_ray.stages.clustering.vectors.hidden_state import HiddenState
from moedisco_ray.stages.merge.calibrate import RouterSettings, calibrated
from moedisco_ray.stages.scoring import perplexity
from moedisco_ray.stages.text.validation import Documents

CLUSTERS = 4
BATCHES = 3

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def _on_gpus() -> Iterator[None]:
    with path_of_gpus():
        yield


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceBytes]:
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: False)  # so that consecutive positions need no mask
    monkeypatch.setattr(streamed, "map_pages", lambda tensor: tensor)  # FakeTensors have no pages
    live = InferenceBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live, HostCopies(live):
        yield live


def on_card(checkpoint: str, card: int, *, stays: bool) -> tuple[StreamedModel, dict[str, Any]]:
    """A checkpoint on a card of some GB, and its configuration; only the first layers, unless all stay loaded."""
    family, vocabulary, sizes = PUBLISHED[checkpoint]
    model = StreamedModel(family, sizes, vocabulary, gpu=1, memory_gb=card)
    if not stays or not model.stays:
        sizes = sizes.model_copy(update={"num_hidden_layers": 2 + DECLARATIONS[family].dense_layers(sizes.fields)})
    return model, hf_config(family, sizes, vocabulary, SEQUENCE, 0).to_dict()


def stored(config: dict[str, Any], live: InferenceBytes) -> Iterator[tuple[str, Tensor]]:
    for name, shape in canonical_shapes(config).items():
        with live.on_host():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
        yield name, tensor


def compare(plan: Memory, live: InferenceBytes, card: int) -> None:
    planned = plan.weights + plan.activations
    shown = f"measured {live.peak / GIB:.2f} GiB, planned {plan.weights / GIB:.2f} + {plan.activations / GIB:.2f}"
    assert planned == pytest.approx(live.peak, rel=0.05), shown
    assert plan.total > card * GIB or live.peak < card * GIB


def check_calibration(checkpoint: str, card: int, live: InferenceBytes) -> None:
    model, config = on_card(checkpoint, card, stays=False)
    windows, experts = BATCH_TOKENS // SEQUENCE, model.sizes.num_experts
    clusters = experts if experts % CLUSTERS else CLUSTERS  # FlexOlmo has 7 experts
    batches = [
        (np.zeros((windows, SEQUENCE), dtype=np.int64), np.full(windows, number % clusters))
        for number in range(BATCHES)
    ]
    settings = RouterSettings("ridge")
    for _ in calibrated(
        stored(config, live), config, clusters, batches, settings=settings, report=[], dtype=torch.bfloat16
    ):
        pass
    plan = calibration_memory(model, tokens=BATCHES * BATCH_TOKENS, sequence_length=SEQUENCE, clusters=clusters)
    compare(plan, live, card)


def on_device(
    checkpoint: str, card: int, live: InferenceBytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[StreamedModel, PreTrainedModel]:
    model, config = on_card(checkpoint, card, stays=True)
    monkeypatch.setattr(streamed, "RESIDENT_BYTES", 2**50 if model.stays else 0)
    monkeypatch.setattr(layer_stream, "CPU_STATES", GPU_STATES)
    return model, specialise(streamed_model(dict(stored(config, live)), config, dtype=torch.bfloat16))


def check_evaluation(checkpoint: str, card: int, live: InferenceBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    model, network = on_device(checkpoint, card, live, monkeypatch)
    count = BATCHES * BATCH_TOKENS // SEQUENCE
    documents = Documents(
        ids=(b"",) * count,
        sources=("",) * count,
        texts=("",) * count,
        tokens=tuple(np.zeros((count, SEQUENCE), dtype=np.int32)),
        loss_masks=(None,) * count,
    )
    assert perplexity(network, documents, prefix=0, sequence_length=SEQUENCE).tokens == BATCHES * BATCH_TOKENS
    compare(scoring_memory(model, tokens=BATCHES * BATCH_TOKENS, sequence_length=SEQUENCE), live, card)


@pytest.mark.slow
def test_calibrating_olmoe_takes_what_the_plan_says(live: InferenceBytes) -> None:
    check_calibration("OLMoE-1B-7B", 80, live)


def test_evaluating_olmoe_takes_what_the_plan_says(live: InferenceBytes, monkeypatch: pytest.MonkeyPatch) -> None:
    check_evaluation("OLMoE-1B-7B", 24, live, monkeypatch)


@pytest.mark.fake
@pytest.mark.parametrize("checkpoint", PUBLISHED)
def test_calibration_of_every_checkpoint_takes_what_the_plan_says(checkpoint: str, live: InferenceBytes) -> None:
    check_calibration(checkpoint, 80, live)


@pytest.mark.fake
@pytest.mark.parametrize(("checkpoint", "card"), tuple(itertools.product(PUBLISHED, (24, 80))))
def test_evaluation_of_every_checkpoint_takes_what_the_plan_says(
    checkpoint: str, card: int, live: InferenceBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_evaluation(checkpoint, card, live, monkeypatch)


@pytest.mark.fake
@pytest.mark.parametrize("checkpoint", ["OLMoE-1B-7B", "Qwen3-30B-A3B"])
def test_vectors_of_documents_take_what_the_plan_says(
    checkpoint: str, live: InferenceBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, network = on_device(checkpoint, 24, live, monkeypatch)
    vectoriser: Any = object.__new__(HiddenState)
    vectoriser._model, vectoriser._device = network, "cpu"
    vectoriser._max_tokens, vectoriser._batch_tokens = SEQUENCE, VECTOR_TOKENS
    tokens = BATCHES * VECTOR_TOKENS
    texts = list(np.zeros((tokens // SEQUENCE, SEQUENCE), dtype=np.int32))
    assert vectoriser.embed([""] * len(texts), texts).shape == (len(texts), model.sizes.hidden_size)
    compare(vectors_memory(model, tokens=tokens, sequence_length=SEQUENCE), live, 24)


@pytest.mark.parametrize(("experts", "inner"), [(1, 1024), (8, 96)])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        *((family, {}) for family in FAMILIES),
        *(
            (name, {page.recurrence.interval_field: 1})
            for name, page in DECLARATIONS.items()
            if page.recurrence is not None
        ),
    ],
)
def test_a_layer_of_every_family_holds_what_the_plan_says(
    family: FamilyName, fields: dict[str, Any], experts: int, inner: int, live: InferenceBytes
) -> None:
    sizes = Architecture(
        hidden_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=top_k_of(family, min(4, experts)),
        fields=fields,
        num_key_value_heads=None if DECLARATIONS[family].attention.latent else 2,
    )
    config = hf_config(family, sizes, 64, SEQUENCE, 0).to_dict()
    network = specialise(streamed_model(dict(stored(config, live)), config, dtype=torch.bfloat16))
    part: Any = network.get_submodule("model.layers.0").streamed_part
    with live.on_host():
        part.load()
    hidden_BLD = torch.empty(4, SEQUENCE, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        layer_step(network, 0)(hidden_BLD)
    measured = (live.peak - hidden_BLD.nbytes) / (4 * SEQUENCE)
    assert layer_bytes_per_token(family, sizes, 2, SEQUENCE) == pytest.approx(measured, rel=0.05)
