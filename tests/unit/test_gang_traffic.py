"""The plan's bytes per step against bytes that are counted in one of eight workers, without the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import L, write_tiny
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from docs.plans import CHECKPOINTS, planned
from moedisco_ray.core.config import HighMemoryPool, Optimizer, check_config, read_architecture
from moedisco_ray.models import expert_parallel
from moedisco_ray.plan import Plan, StagePlan, build_plan
from moedisco_ray.plan.gang_traffic import gang_traffic, step_exchanges, total_bytes
from moedisco_ray.plan.memory import Exchange
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.stepper import ResidentStepper

WORKERS, SEQUENCES = 8, 4
FAMILY = "qwen3_moe"


class Sent(TorchDispatchMode):
    """Counts the bytes that this worker sends: gathers, reductions, sums over replicas, and tokens sent to experts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.summed = self.travelled = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__
        if "allgather_base" in name or "reduce_scatter_base" in name:
            self.bytes += abs(args[0].nbytes - args[1].nbytes)  # all parts but the worker's own
        elif "allreduce" in name:
            self.summed += sum(tensor.nbytes for tensor in args[0])
        return function(*args, **(kwargs or {}))


class Travel(torch.autograd.Function):
    """An exchange of tokens among workers that all have the same ones, so that each gets what it sends."""

    counted: Sent | None = None

    @staticmethod
    def forward(_ctx: Any, tokens: Tensor) -> Tensor:
        if Travel.counted is not None:
            Travel.counted.travelled += tokens.nbytes
        return tokens.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]  # torch takes any number
        if Travel.counted is not None:
            Travel.counted.travelled += gradient.nbytes
        return gradient.clone()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("moe")
    write_tiny(directory, 8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORKERS)
    yield directory
    dist.destroy_process_group()


def counted(directory: Path, recipe: Optimizer, exchange: Exchange, layout: Layout) -> float:
    """Bytes that this worker sends in the second of two steps."""
    job = TrainJob(
        stage="finetune",
        name="fake",
        model=directory,
        packed_dirs=(),
        output=Path(),
        checkpoints=Path(),
        steps=2,
        sequence_length=L,
        optimizer=recipe,
        checkpoint_every=None,
        exchange=exchange,
    )
    world = World(0, WORKERS, layout=layout)
    step = ResidentStepper(trainable(directory, recipe, world, exchange=exchange), job, world)
    tokens = torch.ones(SEQUENCES, L, dtype=torch.long)
    batch = [MicroBatch(part, part, job.step_tokens, None) for part in tokens.split(recipe.micro_batch or SEQUENCES)]
    step(batch)
    with Sent() as sent:
        Travel.counted = sent
        step(batch)
        Travel.counted = None
    return sent.bytes + sent.travelled * (1 - 1 / layout.expert) + 2 * sent.summed * (1 - 1 / layout.replicate)


LAYOUTS = [
    Layout(data=8),
    Layout(expert=8),
    Layout(data=2, expert=4),
    Layout(replicate=2, data=4),
    Layout(replicate=2, expert=4),
]


@pytest.mark.parametrize(("exchange", "micro_batch", "checkpointing"), [("step", 4, False), ("micro_batch", 1, True)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_worker_sends_the_bytes_of_the_plan(
    model: Path,
    layout: Layout,
    exchange: Exchange,
    micro_batch: int,
    checkpointing: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expert_parallel, "all_to_all_single_autograd", lambda tokens, *_: Travel.apply(tokens))
    monkeypatch.setattr(expert_parallel.dist, "all_to_all_single", lambda target, source, **_: target.copy_(source))
    recipe = Optimizer(
        batch_tokens=WORKERS * SEQUENCES * L,
        micro_batch=micro_batch,
        gradient_checkpointing=checkpointing,
        precision="fp32",
    )
    sizes = read_architecture(model, FAMILY)
    expected = total_bytes(
        step_exchanges(
            FAMILY,
            sizes,
            count_parameters(FAMILY, sizes, sizes.vocab_size or 0),
            recipe,
            sequence_length=L,
            gpu=0,
            layout=layout,
            exchange=exchange,
        )
    )
    assert expected == pytest.approx(counted(model, recipe, exchange, layout), rel=0.02)


@pytest.mark.parametrize("exchange", ["step", "micro_batch"])
def test_dividing_the_experts_of_qwen3_saves_two_thirds_of_the_traffic(exchange: Exchange) -> None:
    family, vocabulary, sizes = CHECKPOINTS["Qwen3-30B-A3B"]
    recipe = Optimizer(batch_tokens=WORKERS * 4 * 1024, micro_batch=1, precision="pure_bf16")
    found = gang_traffic(
        family,
        sizes,
        vocabulary,
        recipe,
        sequence_length=1024,
        pool=HighMemoryPool(gpu=1),
        layout=Layout(data=WORKERS),
        exchange=exchange,
    )
    assert found.bytes == found.sharded
    assert found.expert == WORKERS
    assert found.divided <= found.sharded / 3


def qwen3(parallel: dict[str, int], room: dict[str, float]) -> Plan:
    """Plan of a fine-tune on eight cards; `room` is their memory, if it is less than they have."""
    family, vocabulary, sizes = CHECKPOINTS["Qwen3-30B-A3B"]
    optimizer = {"batch_tokens": WORKERS * 4 * 1024, "micro_batch": 1}
    return build_plan(
        check_config(
            {
                "name": "plan",
                "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 1024},
                "clusters": {"count": 32},
                "model": {
                    "family": family,
                    "config": sizes.model_dump(exclude_unset=True) | {"vocab_size": vocabulary},
                },
                "tokens": {"total": 1_000_000_000},
                "submodels": {"optimizer": optimizer},
                "finetune": {"optimizer": optimizer, "parallel": parallel},
                "pools": {
                    "low_memory": {"gpu": 1, "memory_gb": 24, "max_workers": 32},
                    "high_memory": {"gpu": 1, "card": "H200", "workers": WORKERS, "gpus_per_node": WORKERS, **room},
                },
            }
        )
    )


def test_a_plan_knows_divided_experts_and_replicas() -> None:
    def finetune(room: dict[str, float], **parallel: int) -> StagePlan:
        return next(stage for stage in qwen3(parallel, room).stages if stage.stage == "finetune")

    little = {"memory_gb": 84.0}  # too little to exchange once per step, even with divided experts
    sharded, divided = finetune(little, expert=1), finetune(little)
    assert sharded.traffic is not None
    assert divided.traffic is not None
    assert (sharded.traffic.divided, sharded.traffic.sharded) == (divided.traffic.bytes, divided.traffic.sharded)
    assert divided.memory.compute_copies < sharded.memory.compute_copies
    assert divided.memory.weights == sharded.memory.weights
    one, two = (finetune({}, expert=1, replicate=replicas).memory.weights for replicas in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-6)
    # FSDP alone exchanges 1 TB in 2 s; with experts divided among the cards of the node, the operations take longer.
    seconds = {
        name: stage.cost.hours * 3600 / stage.steps for name, stage in (("sharded", sharded), ("divided", divided))
    }
    assert sharded.traffic.seconds == pytest.approx(sharded.traffic.bytes / 450e9, rel=0.01)
    assert seconds["sharded"] == pytest.approx(sharded.traffic.seconds, rel=0.02)
    assert divided.traffic.seconds < seconds["divided"] < seconds["sharded"] / 2


def test_what_crosses_nodes_takes_the_time_of_their_network() -> None:
    def seconds(**pool: Any) -> float:
        traffic = gang_traffic(
            *CHECKPOINTS["Qwen3-30B-A3B"][:1],
            CHECKPOINTS["Qwen3-30B-A3B"][2],
            151_936,
            Optimizer(batch_tokens=WORKERS * 4 * 1024, micro_batch=1),
            sequence_length=1024,
            pool=HighMemoryPool(gpu=1, card="H100", **pool),
            layout=Layout(replicate=2, expert=4),
            exchange="step",
        )
        return traffic.seconds

    on_one, on_two, alone = (seconds(gpus_per_node=count) for count in (8, 4, 1))
    assert on_one < on_two / 20  # four sums of gradients share the network of a node
    assert on_one < alone / 20  # tokens cross the network too
    assert seconds(gpus_per_node=4, network=100) == pytest.approx(on_two / 10, rel=0.2)


def test_a_single_worker_exchanges_nothing() -> None:
    assert planned("OLMoE-1B-7B", "finetune", 1).traffic is None
