"""What the merge's settings are worth on the demo: validation loss of the merged model, and after its fine-tune.

Every arm is the same run with other merge settings: what comes before the merge is made once, in one plain process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import environment, write_result

from moedisco_ray import pipeline
from moedisco_ray.artifacts import read_json
from moedisco_ray.config import check_config
from moedisco_ray.config.presets import preset_text
from moedisco_ray.in_process import InProcess

ARMS: dict[str, dict[str, Any]] = {
    "uniform, ridge": {"backbone": "uniform"},
    "uniform, ridge, load not matched": {"backbone": "uniform", "match_load": False},
    "uniform, centroid": {"backbone": "uniform", "router": "centroid"},
    "uniform, random": {"backbone": "uniform", "router": "random"},
    "uniform, random, load not matched (the paper)": {"backbone": "uniform", "router": "random", "match_load": False},
    "token_weighted, ridge": {"backbone": "token_weighted"},
    "ties, ridge": {"backbone": "ties"},
    "dare, ridge": {"backbone": "dare"},
    "auto, ridge": {"backbone": "auto"},
}


def measure(tokens: int, seed: int) -> dict[str, Any]:
    """Nats per token on validation text of every arm, and what `auto` chose."""
    torch.set_num_threads(1)
    demo = yaml.safe_load(preset_text("demo"))
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for arm, settings in ARMS.items():
            config = check_config({
                **demo, "output": scratch, "seed": seed, "tokens": {**demo["tokens"], "total": tokens},
                "merge": {**demo["merge"], **settings}})
            directory = pipeline.run(config, redo=True, shell=InProcess())
            stages = read_json(directory / "evaluation" / "evaluation.json")["stages"]
            chosen = read_json(directory / "merged" / "merge.json")["backbone"]
            found[arm] = {"merged": stages["merge"]["loss"], "finetuned": stages["finetune"]["loss"], "backbone": chosen}
            print(arm, found[arm], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=800_000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    write_result("merge_choices", {
        **environment(f"python {Path('benchmarks', Path(__file__).name)} --tokens {arguments.tokens} --seeds {arguments.seeds}"),
        "setting": {"preset": "demo", "tokens": arguments.tokens},
        "losses": {seed: measure(arguments.tokens, seed) for seed in range(arguments.seeds)},
    })


if __name__ == "__main__":
    main()
