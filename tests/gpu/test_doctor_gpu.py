"""The trials of `moedisco doctor` on a card, for every family."""

from __future__ import annotations

import pytest
import torch

from moedisco_ray.core.config import FAMILIES, Architecture, FamilyName, Optimizer
from moedisco_ray.execution.doctor.facts import card_facts, machine_facts
from moedisco_ray.execution.doctor.system import Wanted, card_checks, machine_checks
from moedisco_ray.training.examination.copies import copy_speeds, host_memory_speed, speed_to_card
from moedisco_ray.training.examination.kernels import Kernels, try_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
SIZES = Architecture(
    hidden_size=512, num_attention_heads=8, moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_agrees_with_fp64_on_the_cpu(device: str, family: FamilyName, precision: str) -> None:
    kernels = Kernels(family, SIZES, Optimizer(precision=precision))  # type: ignore[arg-type]  # a literal
    found = {
        each.name: (each.error, each.limit, each.reason) for each in try_kernels(kernels, device) if not each.passed
    }
    assert found == {}


def test_the_card_and_its_machine_are_described(device: str) -> None:
    facts = card_facts("cuda:0")
    assert facts.name == torch.cuda.get_device_name()
    assert 0 < facts.free <= facts.memory
    checks = [*card_checks(facts, Wanted()), *machine_checks(machine_facts(), Wanted(), gpu=True)]
    assert {check.state for check in checks} <= {"ok", "warning", "skipped"}


def test_copies_have_a_speed(device: str) -> None:
    found = copy_speeds("cuda:0", size=64 << 20)
    assert min(found.to_card, found.from_card, found.both) > 1e8
    assert speed_to_card("cuda:0", seconds=0.2, size=64 << 20) > 1e8
    assert host_memory_speed(64 << 20) > 1e8
