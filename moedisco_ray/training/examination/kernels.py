"""The kernels of one layer of a model on a device, against the same in fp64 on the CPU.

Axes: T tokens, E experts, K selected experts, D hidden, V vocabulary, L sequence length, A and B the sides of matrices.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.core.config import Architecture, FamilyName, Optimizer
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.limits import LOGITS_BYTES, MOMENT_BLOCK, NEWTON_SCHULZ_STEPS
from moedisco_ray.core.store.locations import first_line
from moedisco_ray.models import hf_config, moe_blocks
from moedisco_ray.models.attention import attend_within_documents
from moedisco_ray.models.expert_parallel import divided_experts
from moedisco_ray.models.speed import grouped_experts, sorted_experts
from moedisco_ray.plan.parameters import submodel_architecture
from moedisco_ray.training import muon
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.job import World
from moedisco_ray.training.moments import SCALE, decoded
from moedisco_ray.training.optimizer import BETAS, RoundingAdamW
from moedisco_ray.training.sharding import autocast, compute_dtype, configured

_BF16_ERROR = 0.01
"""Largest relative error of a product in bf16 and of its gradients; 0.003 to 0.006 were measured."""
_FP32_ERROR = {"cpu": 1e-4, "cuda": 5e-3}
"""Largest relative error of a product in fp32, by device: a GPU may round its factors to TF32."""
_LAYER_FACTOR = 5.0
"""Factor by which the error of a whole layer's gradients may be larger; in bf16, 0.006 to 0.022 were measured."""
_MUON_ERROR = {"cpu": 1e-3, "cuda": 0.05}
"""Largest relative error of Muon's matrices, by device; in bf16, as on a GPU, 0.024 to 0.026 were measured."""
_FP8_ERROR = 1 / 8
"""Largest relative error of a moment in 8 bits."""
_STEP_ERROR = 1e-3
"""Largest relative error of an update of weights in fp32."""
_FP8_FLOOR = 2.0**-15
"""Largest error of a moment in 8 bits, relative to it and to the largest moment of its block."""
_TOKENS, _LENGTH, _DOCUMENT = 256, 128, 50
_VOCABULARY = 512
_MOST_EXPERTS = 8
_REFERENCE_BYTES = 2 * 2**30
"""Maximum size of the experts of a layer in fp64."""
_MOST_LAYERS = 8
_RATE, _EPSILON = 1e-3, 1e-8
"""Learning rate, and what AdamW adds to the root of the second moment."""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The layer to try.

    Attributes:
        family: The model's family.
        architecture: Sizes of the whole model.
        optimizer: Settings of its training.
    """

    family: FamilyName
    architecture: Architecture
    optimizer: Optimizer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one trial.

    Attributes:
        name: The kernel.
        error: Its largest relative error; None if it did not run.
        limit: Largest error that passes.
        reason: Why it did not run; None if it ran.
        impossible: Whether the family cannot do it, so that it is no failure.
    """

    name: str
    error: float | None
    limit: float
    reason: str | None = None
    impossible: bool = False

    @property
    def passed(self) -> bool:
        return self.impossible or (self.error is not None and self.error <= self.limit)


def try_kernels(kernels: Kernels, device: str) -> Iterator[Outcome]:
    """Try each kernel, whatever the ones before it did."""
    trials: dict[str, Callable[[], tuple[float, float]]] = {
        "grouped product of experts": functools.partial(_grouped_product, kernels, device, exchanges=False),
        "exchange of divided experts": functools.partial(_grouped_product, kernels, device, exchanges=True),
        "layer with packed documents": functools.partial(_layer, kernels, device),
        "loss in tiles": functools.partial(_loss, kernels, device),
        "Muon step": functools.partial(_muon, kernels, device),
        "moments in 8 bits": functools.partial(_moments, kernels, device),
    }
    for name, trial in trials.items():
        try:
            error, limit = trial()
            yield Outcome(name, error, limit)
        except ConfigError as error:  # the layers carry a state from one document to the next
            yield Outcome(name, None, 0.0, first_line(error), impossible=True)
        except (RuntimeError, TypeError, ValueError) as error:  # torch has no such kernel, or it refuses the sizes
            yield Outcome(name, None, 0.0, first_line(error))


def largest_error(dtype: torch.dtype, device: str) -> float:
    """Largest relative error of a product of matrices, and of its gradients."""
    return _BF16_ERROR if dtype is torch.bfloat16 else _FP32_ERROR[torch.device(device).type]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference, relative to that of the exact tensor."""
    exact = exact.double()
    return float(torch.linalg.vector_norm(found.double().cpu() - exact) / torch.linalg.vector_norm(exact))


def _grouped_product(kernels: Kernels, device: str, *, exchanges: bool) -> tuple[float, float]:
    random = torch.Generator().manual_seed(0)
    dtype = compute_dtype(kernels.optimizer, device)
    block = next(iter(moe_blocks(_model(kernels, _fewer_experts(kernels), dtype, with_experts=True)).values()))
    experts: Any = block.get_submodule("experts")
    D, E = kernels.architecture.hidden_size, int(experts.num_experts)
    x_TD = torch.randn(_TOKENS, D, dtype=dtype, generator=random)
    chosen_TK = torch.rand(_TOKENS, E, generator=random).topk(min(2, E)).indices
    weight_TK = torch.rand(chosen_TK.shape, dtype=dtype, generator=random)
    exact = copy.deepcopy(experts).double()
    expected = _output_and_gradients(sorted_experts, exact, x_TD.double(), chosen_TK, weight_TK.double())
    given = (each.to(device) for each in (x_TD, chosen_TK, weight_TK))
    with _group_of_one(device) if exchanges else contextlib.nullcontext(grouped_experts) as compute:
        found = _output_and_gradients(compute, experts.to(device), *given)
    return max(map(relative_error, found, expected)), largest_error(dtype, device)


@contextlib.contextmanager
def _group_of_one(device: str) -> Iterator[Callable[..., Tensor]]:
    """Experts that are divided among this process alone: their tokens pass through the library of exchanges."""
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{Path(folder, 'rendezvous')}", rank=0, world_size=1)
        try:
            yield functools.partial(divided_experts, group=dist.group.WORLD, compute=grouped_experts)
        finally:
            dist.destroy_process_group()


def _output_and_gradients(
    compute: Callable[..., Tensor], experts: nn.Module, x_TD: Tensor, chosen_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, ...]:
    """Output of experts, and the gradients of its sum of squares."""
    x_TD = x_TD.requires_grad_()
    y_TD = compute(experts, x_TD, chosen_TK, weight_TK)
    gradients = torch.autograd.grad(y_TD.double().square().sum(), (x_TD, experts.get_parameter("down_proj")))
    return (y_TD.detach(), *gradients)


def _layer(kernels: Kernels, device: str) -> tuple[float, float]:
    """Gradients of the loss of one layer with one expert, if the family has such sub-models, on packed documents."""
    random = torch.Generator().manual_seed(0)
    recipe = kernels.optimizer.model_copy(update={"within_documents": True, "compile": False})
    router = DECLARATIONS[kernels.family].router
    sizes = submodel_architecture(
        kernels.family, kernels.architecture, kernels.architecture.num_experts // router.least_in_group
    )
    dtype = torch.bfloat16 if recipe.state == "bf16" else torch.float32
    model = _model(kernels, sizes, dtype)
    exact = copy.deepcopy(model).double()
    tokens_BL = torch.randint(_VOCABULARY, (2, _LENGTH), generator=random)
    positions_BL = (torch.arange(_LENGTH) % _DOCUMENT).expand(2, -1)
    attend_within_documents(exact, "cpu", torch.float64)
    attend_within_documents(model, device, compute_dtype(recipe, device))
    in_full = recipe.model_copy(update={"precision": "fp32"})
    expected = _gradient(exact, in_full, "cpu", tokens_BL, positions_BL)
    found = _gradient(model.to(device), recipe, device, tokens_BL, positions_BL)
    return relative_error(found, expected), _LAYER_FACTOR * largest_error(compute_dtype(recipe, device), device)


def _gradient(
    model: PreTrainedModel, recipe: Optimizer, device: str, tokens_BL: Tensor, positions_BL: Tensor
) -> Tensor:
    """All gradients of the loss, one after the other."""
    configured(model, recipe)
    tokens_BL, positions_BL = tokens_BL.to(device), positions_BL.to(device)
    with autocast(recipe, World(device=device)):
        loss = model(tokens_BL, tokens_BL.roll(-1, dims=1), positions_BL)
    torch.autograd.backward(loss)
    return torch.cat([each.grad.double().flatten().cpu() for each in model.parameters() if each.grad is not None])


def _loss(kernels: Kernels, device: str) -> tuple[float, float]:
    random = torch.Generator().manual_seed(0)
    dtype = compute_dtype(kernels.optimizer, device)
    D, V = min(256, kernels.architecture.hidden_size), min(32_768, kernels.architecture.vocab_size or _VOCABULARY)
    T = LOGITS_BYTES // (16 * V) + 64
    hidden_TD, head_VD = (
        torch.randn(T, D, generator=random).to(dtype),
        (torch.randn(V, D, generator=random) / D**0.5).to(dtype),
    )
    targets_T = torch.randint(V, (T,), generator=random)
    targets_T[::7] = -100

    def plain(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
        return cross_entropy(linear(hidden_TD, head_VD), targets_T, reduction="sum")

    expected = _loss_and_gradients(plain, hidden_TD.double(), head_VD.double(), targets_T)
    found = _loss_and_gradients(summed_cross_entropy, *(each.to(device) for each in (hidden_TD, head_VD, targets_T)))
    return max(map(relative_error, found, expected)), largest_error(dtype, device)


def _loss_and_gradients(
    compute: Callable[..., Tensor], hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor
) -> tuple[Tensor, ...]:
    given = (hidden_TD.requires_grad_(), head_VD.requires_grad_())
    loss = compute(*given, targets_T)
    return (loss.detach(), *torch.autograd.grad(loss, given))


def _muon(kernels: Kernels, device: str) -> tuple[float, float]:
    """Muon's orthogonal matrices, against its polynomial of the singular values."""
    random = torch.Generator().manual_seed(0)
    A, B = (min(size, 512) for size in (kernels.architecture.hidden_size, kernels.architecture.moe_intermediate_size))
    matrices_EAB = torch.randn(2, A, B, generator=random)
    u_EAC, s_EC, v_ECB = torch.linalg.svd(matrices_EAB.double(), full_matrices=False)
    s_EC = s_EC / torch.linalg.vector_norm(s_EC, dim=1, keepdim=True)
    a, b, c = muon.COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        s_EC = a * s_EC + b * s_EC**3 + c * s_EC**5
    found = muon.orthogonalised(matrices_EAB.to(device))
    return relative_error(found, u_EAC * s_EC[:, None] @ v_ECB), _MUON_ERROR[torch.device(device).type]


def _moments(kernels: Kernels, device: str) -> tuple[float, float]:
    """The first AdamW step with moments in 8 bits: its weights, and what its moments hold."""
    random = torch.Generator().manual_seed(0)
    rows = min(64, kernels.architecture.hidden_size)
    weight, gradient = (
        torch.randn(rows, 256, generator=random),
        torch.randn(rows, 256, generator=random) * torch.rand(rows, 1, generator=random),
    )
    parameter = nn.Parameter(weight.to(device, copy=True))
    parameter.grad = gradient.to(device)
    optimizer = RoundingAdamW([parameter], lr=_RATE, fp8=True)
    optimizer.step()
    exact = weight.double() - _RATE * gradient.double() / (gradient.double().abs() + _EPSILON)
    change = relative_error(parameter.detach().cpu().double() - weight.double(), exact - weight.double())
    state = optimizer.state[parameter]
    kept = decoded(state["exp_avg"], state[f"exp_avg{SCALE}"]).double().cpu() / (1 - BETAS[0])
    difference, size = (kept - gradient.double()).abs(), gradient.double().abs()
    largest = (
        size.reshape(rows, -1, MOMENT_BLOCK).amax(dim=2, keepdim=True).expand(-1, -1, MOMENT_BLOCK).reshape_as(size)
    )
    worst = float((difference / (size * _FP8_ERROR + largest * _FP8_FLOOR)).amax())
    return _FP8_ERROR * max(worst, change / _STEP_ERROR), _FP8_ERROR


def _fewer_experts(kernels: Kernels) -> Architecture:
    """Sizes of the layer with at most `_MOST_EXPERTS` experts, whose reference fits into memory."""
    sizes = kernels.architecture
    each = 8 * 3 * sizes.hidden_size * sizes.moe_intermediate_size
    most = max(2, min(_MOST_EXPERTS, _REFERENCE_BYTES // each))
    count = max(n for n in range(1, most + 1) if sizes.num_experts % n == 0)
    return submodel_architecture(kernels.family, sizes, sizes.num_experts // count)


def _model(kernels: Kernels, sizes: Architecture, dtype: torch.dtype, *, with_experts: bool = False) -> PreTrainedModel:
    """A model with few layers; one has experts, if they are needed."""
    for layers in range(1, _MOST_LAYERS + 1):
        shape = sizes.model_copy(update={"num_hidden_layers": layers, "vocab_size": None})
        config = hf_config(kernels.family, shape, _VOCABULARY, _LENGTH, 0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if not with_experts or moe_blocks(model):
            return model
    raise RuntimeError(f"the first {_MOST_LAYERS} layers have no experts")
