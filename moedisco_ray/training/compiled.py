"""Compile the decoder layers of a model with `torch.compile`: one graph serves all layers of a kind, as in torchtitan.

The router and the experts of a layer with several experts stay outside, because the card decides how their products run
(`models.speed`). Each shape of a micro-batch has a graph of its own, and evaluation runs without graphs. So the result
of a step depends neither on earlier steps nor on evaluations, and a resumed training equals an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models import moe_blocks

_GRAPHS = 64
"""Maximum number of graphs of all layers; further ones would run without compilation. Layers differ by kind,
micro-batches by shape and mask, and `optimizer.block_steps` by the layers that train."""
_COMPILERS = {"cpu": ("CXX", "g++"), "cuda": ("CC", "gcc", "clang")}
"""Environment variable and programs with which torch compiles the code of a graph, by device."""


@dataclasses.dataclass
class Switch:
    """Whether layers run compiled while they train.

    Attributes:
        on: Whether they do.
    """

    on: bool = True


def compile_layers(model: PreTrainedModel, device: str) -> Switch:
    """Compile the decoder layers of a model in place, when they first run in training mode.

    Returns:
        A switch that is on; while it is off, the layers run as they did before.

    Raises:
        ConfigError: This machine has no C compiler.
    """
    variable, *programs = _COMPILERS[torch.device(device).type]
    if not any(map(shutil.which, (os.environ.get(variable, ""), *programs))):
        raise ConfigError(
            "optimizer.compile",
            value=True,
            remedy=(
                f"needs {' or '.join(programs)} on every machine that trains; install it there, or set it to false"
            ),
        )
    outside = functools.cache(torch.compiler.disable)
    for block in moe_blocks(model).values():
        if "forward" not in vars(block):  # `specialise` has replaced the forward pass of the others
            block.forward = types.MethodType(outside(type(block).forward), block)
    switch = Switch()
    for layer in model.model.layers:
        plain = layer.forward
        # `recompile_limit` is a newer argument than the annotations know.
        compiled = torch.compile(plain, dynamic=False, recompile_limit=_GRAPHS)  # type: ignore[call-overload]
        layer.forward = functools.partial(_forward, layer, plain, compiled, switch)
    return switch


def _forward(
    layer: nn.Module,
    plain: Callable[..., Any],
    compiled: Callable[..., Any],
    switch: Switch,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    return (compiled if layer.training and switch.on else plain)(*args, **kwargs)
