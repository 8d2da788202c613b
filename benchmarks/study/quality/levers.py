"""Ablations: the default with one lever at a time reset to the paper's value or to an alternative."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.study.compare.arms import ARMS, Arm

LEVERS: Mapping[str, Arm] = {
    "no-seed": Arm("without the seed phase", {"tokens.seed_share": 0.0, "clusters.vectors": "tfidf_svd"}),
    "mean-token": Arm("clusters of mean token embeddings", {"clusters.vectors": "mean_token"}),
    "tfidf": Arm("clusters of tf-idf", {"clusters.vectors": "tfidf_svd"}),
    "random-clusters": ARMS["random-clusters"],
    "no-capacity": Arm("clusters of any size", {"clusters.capacity": None}),
    "no-rounds": Arm("without rounds", {"submodels.sync_every": None}),
    "nesterov-rounds": Arm("rounds with DiLoCo's Nesterov step", {"submodels.outer": {"lr": 0.7, "momentum": 0.9}}),
    "cosine-branches": Arm("sub-models' rate decays", {"submodels.optimizer.schedule": "cosine"}),
    "fresh-branches": Arm("sub-models begin without the seed's moments", {"submodels.keep_optimizer_state": False}),
    "uniform-mean": Arm("plain mean of the backbones", {"merge.backbone": "uniform"}),
    "random-router": Arm("random router", {"merge.router": "random"}),
    "fast-finetune": Arm("fine-tune at the sub-models' rate", {
        "finetune.optimizer.lr": lambda base: base.submodels.optimizer.lr}),
    "fresh-finetune": Arm("fine-tune begins without the sub-models' moments", {"finetune.keep_optimizer_state": False}),
    "no-load-balance": Arm("no load-balance loss", {"finetune.load_balance": 0.0}),
    "no-z-loss": Arm("no router z-loss", {"finetune.z_loss": 0.0}),
}
"""Arms that each reset one setting of the default to the paper's value or to an alternative."""

REMOVED: Mapping[str, str] = {
    "anchored": "backbone at a tenth of the rate in the last half of the branches",
    "long-delta": "backbone's delta times 1.25",
    "no-match-load": "router's loads as they come",
    "frozen-experts": "first half of the fine-tune with frozen experts",
    "dense-gate": "every expert in the first fifth of the fine-tune",
    "spike-guard": "updates of twice the usual gradient left out",
    "overlap": "a tenth of other clusters' text in each",
    "ties": "TIES",
    "dare": "DARE",
    "auto": "backbones merged as is best on held-out text",
    "centroid-router": "centroid router",
    "likelihood": "clusters by likelihood (EM)",
}
"""Titles of levers that were measured and removed because they gained nothing; their results stay in the table."""

FOR_TOKENS: Mapping[str, Arm] = {
    "long-finetune": Arm("MoE-DisCo, two fifths of the tokens in the fine-tune", {
        "tokens.seed_share": 0.5, "tokens.finetune_share": 0.4})}
"""Arms for limited text instead of limited money; their fine-tune uses joint training's batch size and learning rate."""

KNOWN: Mapping[str, Arm] = {**ARMS, **LEVERS, **FOR_TOKENS}
"""Every arm that the benchmark can run."""

TITLES: Mapping[str, str] = {**REMOVED, **{name: arm.title for name, arm in KNOWN.items()}}
"""Title of every arm that a result file may contain."""
