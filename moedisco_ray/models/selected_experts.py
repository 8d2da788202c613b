"""Experts that are loaded when a token selects them, for models whose experts do not fit on their device.

Shapes: T tokens, K selected experts, E experts, D hidden.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Load = Callable[[int, Mapping[str, Tensor]], None]
"""Copies the weights of an expert into tensors, which have the names of the stacks in memory."""


class SelectedExperts(nn.Module):
    """The experts of a layer, each loaded when a token selects it; those that were used last stay loaded.

    The module of transformers computes, with stacks that hold only the loaded experts: so every family, and whatever
    implementation transformers chooses, gives the results of the whole stacks. If a forward pass selects more experts
    than may stay loaded, as that of a long prompt does, all of them are loaded for this pass.

    Attributes:
        num_experts: Number of the layer's experts.
        loads: Number of experts that were loaded so far.

    Args:
        experts: The module of transformers, on the meta device.
        load: Loads an expert.
        device: Device that the experts run on.
        resident: Number of experts that stay loaded.
    """

    def __init__(self, experts: nn.Module, load: Load, device: str, resident: int) -> None:
        super().__init__()
        self.num_experts = int(experts.num_experts)  # type: ignore[arg-type]  # transformers' modules are untyped
        self.loads = 0
        self._module = (experts.eval(),)  # in a tuple, because the stacks of all experts are no weights of this module
        self._load, self._device = load, device
        self._resident = min(resident, self.num_experts)
        # place in the stacks by expert; the one used last comes last
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._stacks = self._empty(self._resident)

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """The weighted sum of the selected experts' outputs, y_TD."""
        (module,) = self._module
        selected = sorted(set(expert_TK.flatten().tolist()))
        stacks, slots = self._kept(selected) if len(selected) <= self._resident else self._for_one_pass(selected)
        slot_E = torch.zeros(self.num_experts, dtype=expert_TK.dtype)
        slot_E[selected] = torch.tensor(slots, dtype=expert_TK.dtype)
        module.num_experts = len(stacks["down_proj"])  # type: ignore[assignment]
        y_TD: Tensor = functional_call(module, stacks, (x_TD, slot_E.to(expert_TK.device)[expert_TK], weight_TK))
        return y_TD

    def _kept(self, selected: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
        for expert in selected:
            if expert in self._slots:
                self._slots.move_to_end(expert)
        for expert in selected:
            if expert not in self._slots:
                if len(self._slots) == self._resident:
                    self._slots.popitem(last=False)
                slot = min(set(range(self._resident)).difference(self._slots.values()))
                self._fill(self._stacks, slot, expert)
                self._slots[expert] = slot  # only now: Ctrl-C can end the loading
        return self._stacks, [self._slots[expert] for expert in selected]

    def _for_one_pass(self, selected: Sequence[int]) -> tuple[dict[str, Tensor], list[int]]:
        stacks = self._empty(len(selected))
        for slot, expert in enumerate(selected):
            self._fill(stacks, slot, expert)
        return stacks, list(range(len(selected)))

    def _fill(self, stacks: Mapping[str, Tensor], slot: int, expert: int) -> None:
        targets = {name: stack[slot] for name, stack in stacks.items()}
        if expert in self._slots:
            for name, target in targets.items():
                target.copy_(self._stacks[name][self._slots[expert]])
        else:
            self._load(expert, targets)
            self.loads += 1

    def _empty(self, count: int) -> dict[str, Tensor]:
        (module,) = self._module
        return {
            name: torch.empty((count, *stack.shape[1:]), dtype=stack.dtype, device=self._device)
            for name, stack in module.named_parameters()
        }
