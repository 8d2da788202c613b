"""Peak memory of one of eight workers that fine-tune a published checkpoint together, against the plan.

The worker takes steps on FakeTensors, and the other workers do not exist. Tokens are divided evenly among the experts.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from fake_steps import PUBLISHED, SEQUENCE, LiveBytes, fake_model, path_of_gpus, watching_storages
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from docs.plans import BATCH_TOKENS, CHECKPOINTS, planned
from moedisco_ray.core.config import Architecture, FamilyName, Optimizer
from moedisco_ray.models import with_parameters_in
from moedisco_ray.plan.memory import GIB, Exchange, Memory, worker_memory
from moedisco_ray.plan.parameters import submodel_architecture
from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.sharding import _shard, configured
from moedisco_ray.training.stepper import ResidentStepper

pytestmark = [pytest.mark.fake, pytest.mark.timeout(900)]
WORKERS = 8


@pytest.fixture(scope="module", autouse=True)
def _workers() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORKERS)
    with path_of_gpus():
        yield
    dist.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Case:
    """A fine-tune of two sequences per worker and step, or of the number in the chosen settings.

    Attributes:
        checkpoint: Name of the checkpoint.
        layout: How the workers share the model.
        exchange: How often they exchange weights and gradients.
        micro_batch: Sequences per micro-batch.
        checkpointing: Whether layers are recomputed in the backward pass.
        precision: Precision of weights and products.
        parts: Number of sub-models that the checkpoint is cut into; one of them is trained.
        chosen: Settings instead of those above.
    """

    checkpoint: str
    layout: Layout
    exchange: Exchange
    micro_batch: int
    checkpointing: bool = False
    precision: str = "pure_bf16"
    parts: int = 1
    chosen: Optimizer | None = None

    @property
    def recipe(self) -> Optimizer:
        return self.chosen or Optimizer.model_validate(
            {
                "batch_tokens": WORKERS * 2 * SEQUENCE,
                "micro_batch": self.micro_batch,
                "precision": self.precision,
                "gradient_checkpointing": self.checkpointing,
            }
        )

    @property
    def sizes(self) -> tuple[FamilyName, int, Architecture]:
        family, vocabulary, whole = PUBLISHED[self.checkpoint]
        return family, vocabulary, submodel_architecture(family, whole, self.parts)

    def __str__(self) -> str:
        layout, recomputes = self.layout, "-recompute" * self.checkpointing
        division = f"{layout.replicate}x{layout.data}x{layout.expert}"
        return (
            f"{self.checkpoint}-{division}-{self.exchange}-{self.micro_batch}{recomputes}"
            f"-{self.precision}" + f"-{self.parts}" * (self.parts > 1)
        )


SHARDED, DIVIDED, BOTH, REPLICAS = (
    Layout(data=8),
    Layout(expert=8),
    Layout(data=2, expert=4),
    Layout(replicate=2, data=4),
)
WHOLE = Layout(replicate=8)
"""Each worker has a replica of its own, as when several train the seed."""
CASES = [
    Case("OLMoE-1B-7B", SHARDED, "micro_batch", 2),
    Case("OLMoE-1B-7B", SHARDED, "micro_batch", 1),
    Case("OLMoE-1B-7B", SHARDED, "step", 2),
    Case("OLMoE-1B-7B", SHARDED, "step", 1),
    Case("OLMoE-1B-7B", SHARDED, "step", 1, checkpointing=True),
    Case("OLMoE-1B-7B", SHARDED, "micro_batch", 2, precision="bf16"),
    Case("OLMoE-1B-7B", SHARDED, "step", 2, precision="bf16"),
    Case("OLMoE-1B-7B", REPLICAS, "micro_batch", 2),
    Case("OLMoE-1B-7B", REPLICAS, "step", 2),
    Case("OLMoE-1B-7B", WHOLE, "step", 2, parts=4),
    Case("OLMoE-1B-7B", WHOLE, "step", 1, precision="bf16", parts=4),
    Case(
        "OLMoE-1B-7B",
        WHOLE,
        "step",
        1,
        parts=4,
        chosen=Optimizer(name="muon", precision="pure_bf16", batch_tokens=WORKERS * 2 * SEQUENCE, micro_batch=1),
    ),
    Case(
        "OLMoE-1B-7B",
        SHARDED,
        "step",
        1,
        chosen=Optimizer(name="muon", precision="pure_bf16", batch_tokens=WORKERS * 2 * SEQUENCE, micro_batch=1),
    ),
    Case("Qwen3-30B-A3B", WHOLE, "step", 1, checkpointing=True, parts=8),
    Case("OLMoE-1B-7B", DIVIDED, "micro_batch", 2),
    Case("OLMoE-1B-7B", DIVIDED, "step", 2),
    Case("OLMoE-1B-7B", DIVIDED, "step", 1),
    Case("OLMoE-1B-7B", BOTH, "micro_batch", 2),
    # Four experts, so that half of the workers have none.
    Case("Mixtral-8x7B", SHARDED, "micro_batch", 1, checkpointing=True, parts=2),
    Case("Mixtral-8x7B", SHARDED, "step", 1, checkpointing=True, parts=2),
    *(
        Case(name, *rest)
        for name in ("Qwen1.5-MoE-A2.7B", "Mixtral-8x7B", "Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V2-Lite")
        for rest in (
            (SHARDED, "micro_batch", 1, True),
            (SHARDED, "step", 1, True),
            (BOTH, "micro_batch", 2, True),
            (DIVIDED, "step", 1),
        )
        if name != "Qwen1.5-MoE-A2.7B" or rest[0] is not DIVIDED
    ),  # 60 experts
    Case("FlexOlmo-7x7B-1T", SHARDED, "micro_batch", 1, checkpointing=True),  # 7 experts
    Case("Qwen3.5-35B-A3B", SHARDED, "micro_batch", 1, checkpointing=True),
    Case("Qwen3.5-35B-A3B", DIVIDED, "step", 1),
    *(
        Case(name, *rest)
        for name in (
            "dots.llm1",
            "Solar-Open-100B",
            "ERNIE-4.5-21B-A3B",
            "Granite-3.0-3B-A800M",
            "LLaMA-MoE-v1-3.5B-4/16",
        )
        for rest in ((SHARDED, "micro_batch", 1, True), (DIVIDED, "step", 1))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_worker_of_a_gang_takes_what_the_plan_says(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(case, planned_memory(case), monkeypatch)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_settings_that_are_chosen_for_eight_cards_take_what_the_plan_says(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(checkpoint, "finetune", WORKERS)
    assert plan.fits
    assert plan.memory.total <= 80 * GIB
    recipe = Optimizer(batch_tokens=BATCH_TOKENS) if plan.choice is None else plan.choice.optimizer
    micro_batch = recipe.micro_batch or BATCH_TOKENS // SEQUENCE // WORKERS
    cases = (Case(checkpoint, SHARDED, exchange, micro_batch, chosen=recipe) for exchange in get_args(Exchange))
    [case] = (each for each in cases if planned_memory(each).total == plan.memory.total)
    compare(case, plan.memory, monkeypatch)


def planned_memory(case: Case) -> Memory:
    family, vocabulary, whole = case.sizes
    return worker_memory(
        family,
        whole,
        vocabulary,
        case.recipe,
        sequence_length=SEQUENCE,
        gpu=1,
        workers=WORKERS,
        exchange=case.exchange,
        layout=case.layout,
    )


def compare(case: Case, plan: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, whole = case.sizes
    selections = case.micro_batch * SEQUENCE * whole.num_experts_per_tok

    def even(counts: FakeTensor) -> Any:
        """Numbers of tokens by direction, worker and expert."""
        shape = tuple(counts.shape)
        (least, more), experts = divmod(selections, math.prod(shape[1:])), np.arange(math.prod(shape[1:]))
        return np.broadcast_to((least + (experts < more)).reshape(shape[1:]), shape).tolist()

    monkeypatch.setattr(FakeTensor, "tolist", even)
    found, expected = measured(case), plan.total - plan.overhead
    shown = {name: round(size / GIB, 2) for name, size in plan.parts.items()}
    assert expected == pytest.approx(found, rel=0.05), (
        f"measured {found / GIB:.2f} GiB, planned {expected / GIB:.2f}: {shown}"
    )


def measured(case: Case) -> int:
    """Peak bytes of two training steps."""
    family, vocabulary, whole = case.sizes
    recipe, world = case.recipe, World(0, WORKERS, layout=case.layout)
    dtype = torch.bfloat16 if recipe.state == "bf16" else torch.float32
    model: Any = with_parameters_in(fake_model(family, whole, vocabulary, dtype), dtype)
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
        exchange=case.exchange,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _shard(configured(model, recipe), torch.bfloat16, world, case.exchange)
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, watching_storages(live):
            model.to_empty(device="cpu")
            model.tie_weights()
            model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
            step = ResidentStepper(model, job, world)
            step._checked = True  # the first step's check of the experts reads their gradients
            tokens = torch.zeros(recipe.batch_tokens // WORKERS // SEQUENCE, SEQUENCE, dtype=torch.long)
            for _ in range(2):
                step(MicroBatch(part, part, job.step_tokens, None) for part in tokens.split(case.micro_batch))
    return live.peak
