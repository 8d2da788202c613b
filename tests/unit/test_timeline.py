"""The timeline of streamed training: limits of the simulation, and steps of published models."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from docs.plans import CHECKPOINTS
from moedisco_ray.core.config import Optimizer
from moedisco_ray.plan.streaming import DIVISIONS, Host, Work, step_between_hosts, step_tasks, step_time, step_work
from moedisco_ray.plan.timeline import Link, Task, timeline

HOST = Host(alone=25e9, both=20e9, all_cards=320e9, memory_speed=140e9, memory_gb=256)
FLOPS = 66e12
SHAPES = ("Qwen1.5-MoE-A2.7B", "OLMoE-1B-7B", "DeepSeek-V2-Lite", "Qwen3-30B-A3B", "gpt-oss-20b")
amounts = st.floats(0, 10, allow_nan=False)


def work_of(checkpoint: str, tokens: int = 65_536, name: str = "muon") -> Work:
    family, vocabulary, sizes = CHECKPOINTS[checkpoint]
    optimizer = Optimizer(name=name, precision="pure_bf16", batch_tokens=tokens, micro_batch=4)
    return step_work(family, sizes, vocabulary, optimizer, sequence_length=1024, gpu=1)


@given(st.lists(st.tuples(amounts, amounts, amounts), min_size=1, max_size=20), st.floats(0.5, 1))
def test_a_timeline_lies_between_its_slowest_engine_and_the_sum_of_all(
    sizes: list[tuple[float, float, float]], both: float
) -> None:
    found = timeline([Task(*each) for each in sizes], Link(1.0, both))
    computing, copied_in, copied_out = (sum(each) for each in zip(*sizes, strict=True))
    assert found.seconds >= max(computing, copied_in, copied_out) - 1e-6
    assert found.seconds <= computing + (copied_in + copied_out) / both + 1e-6


@pytest.mark.parametrize(
    ("task", "seconds"),
    [
        (Task(2.0, 1.0, 1.0), 1 + 10 * 2 + 1),  # arithmetic hides all copies but the first and the last
        (Task(1.0, 3.0, 0.0), 10 * 3 + 1),  # copies in one direction hide the arithmetic
        (Task(0.0, 1.0, 1.0), 1 + 9 / 0.5 + 1),  # both directions at once, at half the speed
    ],
)
def test_ten_equal_tasks_take_what_their_slowest_engine_takes(task: Task, seconds: float) -> None:
    assert timeline([task] * 10, Link(1.0, 0.5)).seconds == pytest.approx(seconds)


def test_inputs_wait_for_the_results_that_they_contain() -> None:
    first, second = Task(1.0, 1.0, 1.0), Task(1.0, 1.0)
    alone = timeline([first, second], Link(1.0, 1.0)).seconds
    assert timeline([first, dataclasses.replace(second, after=0)], Link(1.0, 1.0)).seconds == pytest.approx(alone + 2)
    with pytest.raises(ValueError, match="after those"):
        timeline([dataclasses.replace(first, after=0)], Link(1.0, 1.0))


@pytest.mark.parametrize("checkpoint", SHAPES)
def test_a_step_of_muon_in_bf16_copies_ten_bytes_per_parameter_in_and_six_out(checkpoint: str) -> None:
    work = work_of(checkpoint)
    step = step_time(work, FLOPS, HOST)
    hidden = work.layers * work.tokens * work.hidden
    by_adamw = 2 * (work.parameters - work.layers * work.layer)  # the ends have a second moment
    assert step.to_card == pytest.approx(10 * work.parameters + hidden + by_adamw, rel=0.02)
    assert step.to_host == pytest.approx(6 * work.parameters + hidden + by_adamw, rel=0.02)


@pytest.mark.parametrize("checkpoint", SHAPES)
def test_a_cheap_card_keeps_its_speed_with_65536_tokens_per_step_and_loses_it_with_4096(checkpoint: str) -> None:
    assert step_time(work_of(checkpoint), FLOPS, HOST).kept > 0.95
    assert step_time(work_of(checkpoint, 4096, "adamw"), FLOPS, HOST).kept < 0.7


@pytest.mark.parametrize("division", DIVISIONS)
def test_the_cards_of_a_box_divide_the_arithmetic_of_a_step(division: str) -> None:
    work = work_of("Qwen3-30B-A3B", 524_288)

    def computing(cards: int) -> float:
        return sum(task.computing for task in step_tasks(work, FLOPS, cards=cards, division=division))

    one, eight = computing(1), computing(8)
    assert one == pytest.approx(work.flops / FLOPS)
    assert eight == pytest.approx(one / 8)
    found = step_time(work, FLOPS, HOST, cards=8, division=division)
    assert one / 8 < found.seconds < one


def test_with_divided_layers_each_weight_is_read_once_per_box_or_stays_on_its_card() -> None:
    work = work_of("Qwen3-30B-A3B", 524_288)
    data, layers = (step_time(work, FLOPS, HOST, cards=8, division=each) for each in ("data", "layers"))
    stays = step_time(work, FLOPS, HOST, cards=8, division="layers", kept_gb=12)
    weights = work.layers * work.layer * work.weight
    assert data.to_card > 2 * weights
    assert layers.to_card - stays.to_card == pytest.approx(3 * weights / 8)  # in both passes, and in the update


def test_layers_divided_between_machines_wait_for_a_slow_network() -> None:
    work = work_of("Qwen3-30B-A3B")
    times = [step_between_hosts(work, FLOPS, HOST, hosts=2, network=speed).seconds for speed in (1e7, 1e8, 1e9)]
    assert times == sorted(times, reverse=True)
    assert times[0] > 2 * work.tokens * work.hidden / 1e7
    assert work.flops / FLOPS / 2 < times[2] < work.flops / FLOPS
