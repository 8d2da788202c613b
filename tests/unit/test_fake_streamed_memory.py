"""Card memory of streamed training of published checkpoints, at their true shapes, against the plan.

A card's memory depends on the layers that it holds at once, not on the number of layers, so few of them run.
`make test-fake` runs all cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from fake_steps import PUBLISHED, SEQUENCE, InferenceBytes, fake_model, make_real, path_of_gpus
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models import with_parameters_in
from moedisco_ray.plan.memory import GIB
from moedisco_ray.plan.streamed_memory import streamed_memory
from moedisco_ray.training import TrainJob, World, streamed_update
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.host_copies import Copies
from moedisco_ray.training.sharding import configured
from moedisco_ray.training.streamed_stepper import StreamedStepper

pytestmark = pytest.mark.timeout(900)
SHAPES = ("Qwen1.5-MoE-A2.7B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "gpt-oss-20b")
LAYERS = 3
TOKENS, MICRO_BATCH = 65_536, 16
MOST_GB = 22


@pytest.fixture(autouse=True)
def _on_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(streamed_update, "int", lambda _: 1, raising=False)
    with path_of_gpus():
        yield


class CountedCopies(Copies):
    """Copies of FakeTensors; what they allocate in the host's memory is not the card's.

    As on a card, what computes or leaves keeps its memory until the host knows that it is done.
    """

    def __init__(self, live: InferenceBytes) -> None:
        super().__init__(torch.device("cpu"))
        self._live = live
        self._groups: list[list[Tensor]] = []
        self._sent: list[list[Tensor]] = [[], [], []]

    def begin(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        near = super().begin(tensors)()
        self._groups.append(list(near.values()))
        return lambda: near

    def send(self, near: Tensor, far: Tensor) -> None:
        super().send(near, far)
        self._sent[0].append(near)

    def turn(self) -> None:
        super().turn()
        self._sent = [[], self._sent[0], self._sent[1] + self._sent[2]]

    def settle(self) -> None:
        super().settle()
        del self._groups[:-1]
        self._sent[2].clear()

    def finish(self) -> None:
        super().finish()
        self._groups.clear()

    def host_like(self, tensor: Tensor) -> Tensor:
        with self._live.on_host():
            return super().host_like(tensor)


def measured(checkpoint: str, recipe: Optimizer) -> int:
    """Most bytes on the card in a step; later ones have no more."""
    family, vocabulary, _ = PUBLISHED[checkpoint]
    model = fake_model(family, few(checkpoint), vocabulary, torch.bfloat16)
    configured(with_parameters_in(model, torch.bfloat16), recipe)
    job = TrainJob(
        stage="finetune",
        name="fake",
        model=Path(),
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=2,
        sequence_length=SEQUENCE,
        optimizer=recipe,
        checkpoint_every=None,
        load_balance=0.01,
        z_loss=0.001,
        memory="streamed",
    )
    with FakeTensorMode(), InferenceBytes() as live, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with live.on_host():
            make_real(model)
            step = StreamedStepper(model, job, World(), lambda _: CountedCopies(live))
        step._checked = True  # the first step's check of the experts reads their gradients
        tokens = torch.zeros(recipe.batch_tokens // SEQUENCE, SEQUENCE, dtype=torch.long)
        step(MicroBatch(part, part, job.step_tokens, None) for part in tokens.split(MICRO_BATCH))
        return live.peak


def few(checkpoint: str) -> Architecture:
    family, _, sizes = PUBLISHED[checkpoint]
    layers = LAYERS + DECLARATIONS[family].dense_layers(sizes.fields)
    return sizes.model_copy(update={"num_hidden_layers": layers})


@pytest.mark.fake
@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("checkpoint", SHAPES)
def test_the_card_holds_what_the_plan_says_and_less_than_a_cheap_card_has(checkpoint: str, name: str) -> None:
    recipe = Optimizer(name=name, precision="pure_bf16", batch_tokens=TOKENS, micro_batch=MICRO_BATCH)
    family, vocabulary, _ = PUBLISHED[checkpoint]
    sizes = few(checkpoint)
    plan = streamed_memory(family, sizes, vocabulary, recipe, sequence_length=SEQUENCE, gpu=1)
    found = measured(checkpoint, recipe)
    assert plan.total < MOST_GB * GIB
    assert 0.95 * found < plan.total - plan.overhead < 1.05 * found
