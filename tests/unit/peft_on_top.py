"""LoRA on top of an exported model, as its users add it: with transformers and PEFT alone."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM


def check_lora_on_top(directory: Path, ids_BL: Tensor, adapter: Path, *, lr: float, steps: int) -> None:
    """Adapters learn from a few tokens, the weights below stay, and the stored adapters compute the same again."""
    base = AutoModelForCausalLM.from_pretrained(directory)
    before = [(parameter, parameter.detach().clone()) for parameter in base.parameters()]
    with torch.no_grad():
        expected = base(ids_BL).logits
    torch.manual_seed(0)
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A and B of four matrices of attention and two of experts
    assert len(trained) == 2 * 6 * base.config.num_hidden_layers
    optimizer = torch.optim.AdamW(trained, lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids_BL, labels=ids_BL).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0], losses
    assert all(torch.equal(parameter, value) for parameter, value in before)
    with torch.no_grad():
        with model.disable_adapter():
            assert torch.equal(model(ids_BL).logits, expected)
        model.save_pretrained(adapter)
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), adapter)
        torch.testing.assert_close(again(ids_BL).logits, model(ids_BL).logits)
