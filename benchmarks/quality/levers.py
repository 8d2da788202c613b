"""The default with one lever at a time put back to what the paper has, or to its rival: what each of them is worth."""

from __future__ import annotations

from collections.abc import Mapping

from moedisco_ray.compare.arms import ARMS, Arm

LEVERS: Mapping[str, Arm] = {
    "no-seed": Arm("without the seed phase", {"tokens.seed_share": 0.0, "clusters.vectors": "tfidf_svd"}),
    "no-rounds": Arm("without rounds", {"submodels.sync_every": None}),
    "nesterov-rounds": Arm("rounds with DiLoCo's Nesterov step", {"submodels.outer": {"lr": 0.7, "momentum": 0.9}}),
    "cosine-branches": Arm("sub-models' rate decays", {"submodels.optimizer.schedule": "cosine"}),
    "fresh-branches": Arm("sub-models begin without the seed's moments", {"submodels.keep_moments": False}),
    "fast-finetune": Arm("fine-tune at the sub-models' rate", {
        "finetune.optimizer.lr": lambda base: base.submodels.optimizer.lr}),
    "fresh-finetune": Arm("fine-tune begins without the sub-models' moments", {"finetune.keep_moments": False}),
    "mean-token": Arm("clusters of mean token embeddings", {"clusters.vectors": "mean_token", "clusters.capacity": None}),
    "random-clusters": ARMS["random-clusters"],
    "uniform-mean": Arm("plain mean of the backbones", {"merge.backbone": "uniform"}),
    "ties": Arm("TIES", {"merge.backbone": "ties"}),
    "dare": Arm("DARE", {"merge.backbone": "dare"}),
    "auto": Arm("backbones merged as is best on held-out text", {"merge.backbone": "auto"}),
    "centroid-router": Arm("centroid router", {"merge.router": "centroid"}),
    "random-router": Arm("random router", {"merge.router": "random", "merge.match_load": False, "merge.match_scale": False}),
    "no-balance": Arm("no load-balance or z-loss", {"finetune.load_balance": 0.0, "finetune.z_loss": 0.0}),
    "frozen-experts": Arm("first half of the fine-tune with frozen experts", {"finetune.phases": [
        {"train": "router", "share": 0.03}, {"train": "backbone", "share": 0.47}, {"train": "all", "share": 0.5}]}),
    "anchored": Arm("backbone at a tenth of the rate in the last half of the branches", {
        "submodels.backbone_lr_scale": 0.1, "submodels.backbone_lr_scale_from": 0.5}),
}

KNOWN: Mapping[str, Arm] = {**ARMS, **LEVERS}
"""Every arm that the benchmark can run."""
