"""Speed and memory of generation when the experts are not all on the device.

device          transformers' own model, with all experts on the device
cpu-N, disk-N   experts in the memory of the machine, or in the model's files; N per layer stay on the device

Each arm is a process that answers two prompts, one after the other. When the first answer begins, the files are on the
disk only; the second one may find them in the page cache. The model is random noise, whose tokens select experts almost
evenly: those of a trained model return sooner, so they are loaded less often.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from benchmarks.harness import by_arm, environment, interleave, ratios, spreads, write_result
from benchmarks.true_sizes import Noise, own_memory, settle
from moedisco_ray.core.config import Architecture
from moedisco_ray.models import Stored, canonical_shapes, config_values, hf_config, moe_blocks, write_checkpoint
from moedisco_ray.models.streamed import Offload, open_offloaded

FAMILY, VOCABULARY, PROMPT, NEW = "olmoe", 4096, 16, 48
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
}
ARMS = ("device", "cpu-4", "cpu-8", "cpu-16", "disk-4", "disk-8", "disk-16", "disk-32")


class Clock(BaseStreamer):
    """The time at which the prompt and each new token arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def prepare(home: Path) -> dict[str, Any]:
    """Write the model; return its size."""
    sizes = Architecture.model_validate(SIZES)
    config = config_values(hf_config(FAMILY, sizes, VOCABULARY, PROMPT + NEW, 0)) | {"dtype": "bfloat16"}
    shapes = canonical_shapes(config)
    layout = {key: Stored(shape, torch.bfloat16) for key, shape in shapes.items()}
    write_checkpoint(home / "model", Noise(shapes, 0).items(), config, layout=layout)
    experts = sum(each.nbytes for key, each in layout.items() if ".experts." in key)
    return {"bytes": sum(each.nbytes for each in layout.values()), "expert_bytes": experts}


def measure(arm: str, home: Path, device: str) -> dict[str, float]:
    """Seconds to open the model and to read a prompt, tokens per second, loads per selection, and peaks of memory."""
    settle(list((home / "model").glob("*.safetensors")), forget=True)
    place, _, resident = arm.partition("-")
    with own_memory() as peak:
        began = time.perf_counter()
        if place == "device":
            model = AutoModelForCausalLM.from_pretrained(home / "model", dtype="auto").to(device).eval()
        else:
            offload = Offload(place, int(resident))  # type: ignore[arg-type]
            model = open_offloaded(home / "model", offload, device=device)
        found = {"open_seconds": time.perf_counter() - began}
        for number, name in enumerate(("first", "second")):
            before, clock = _loads(model), Clock()
            prompt_BL = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(number)).to(
                device
            )
            model.generate(prompt_BL, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, streamer=clock)
            start, prompt_read, *_, end = clock.times
            selections = (NEW - 1 + PROMPT) * SIZES["num_experts_per_tok"] * SIZES["num_hidden_layers"]
            found |= {
                f"{name}_prompt_seconds": prompt_read - start,
                f"{name}_per_second": (NEW - 1) / (end - prompt_read),
                f"{name}_loaded": (_loads(model) - before) / selections,
            }
    on_gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.device(device).type == "cuda" else 0.0
    return {**found, "own_mb": peak[0], "gpu_mb": on_gpu}


def _loads(model: Any) -> int:
    return sum(getattr(block.experts, "loads", 0) for block in moe_blocks(model).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["prepare", *ARMS])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.arm:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(1)
        home = arguments.home
        print(
            json.dumps(prepare(home) if arguments.arm == "prepare" else measure(arguments.arm, home, arguments.device))
        )
        return
    with tempfile.TemporaryDirectory(dir=arguments.home) as scratch:
        options = "--home", scratch, "--device", arguments.device
        (written,) = interleave(__spec__.name, ["prepare"], 1, *options)["prepare"]
        arms = interleave(__spec__.name, ARMS, arguments.rounds, *options)
    speeds = by_arm(arms, "second_per_second")
    write_result(
        "expert_offload",
        {
            **environment(f"python -m benchmarks.expert_offload --device {arguments.device}"),
            "setting": {
                "family": FAMILY,
                **SIZES,
                "vocabulary": VOCABULARY,
                "prompt": PROMPT,
                "new_tokens": NEW,
                "threads": 1,
                "device": arguments.device,
                **written,
                "rounds": arguments.rounds,
            },
            "arms": {arm: spreads(found, found[0]) for arm, found in arms.items()},
            "of_device": {arm: ratios(found, speeds["device"]) for arm, found in speeds.items() if arm != "device"},
        },
    )


if __name__ == "__main__":
    main()
