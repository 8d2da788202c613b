"""The report and the events of a run: realistic numbers, made without training."""

import math

import numpy as np

from moedisco_ray.core.records.bill import Line, make_bill
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.ways import THIS_RUN, Alternative, with_ways

STAGES = ["corpus", "seed", "cluster", "decompose", "submodels", "merge", "finetune", "evaluate", "export"]
SOURCES = ("docs", "python", "cpp", "licences")


_FIGURES = {"workers": 1, "gap": 0.0, "memory_gb": 20.0, "limit": None}
WAYS = [
    Alternative(way="joint_high_memory", name="joint training on 1 x A100", seconds=82.0, dollars=0.052, **_FIGURES),
    Alternative(way="run", name=THIS_RUN, seconds=220.0, dollars=0.018, **_FIGURES),
]


def curve(stage, start, end, tokens, points=60, seed=0):
    noise = np.random.default_rng(seed).normal(0, 0.03, points)
    x = np.linspace(tokens / points, tokens, points)
    loss = end + (start - end) * np.exp(-4 * x / tokens) + noise
    return {"stage": stage, "tokens": [int(t) for t in x], "loss": [float(v) for v in loss]}


def bill():
    lines = [Line(stage=stage, pool="low_memory", worker_seconds=20.0, dollars=0.002) for stage in STAGES]
    idle = [Line(stage="idle", pool="high_memory", worker_seconds=100.0, dollars=0.0633)]
    return with_ways(make_bill(lines, idle=idle, seconds=220.0, planned=False, complete=True), WAYS)


def stored_ways():
    """The ways as the first event of a run has them."""
    return [way.model_dump(mode="json") for way in WAYS]


def report():
    rng = np.random.default_rng(3)
    clusters = rng.integers(0, 4, 900)
    centres = np.array([[-2, 0], [1.6, 1.4], [0.2, -1.9], [2.4, -0.6]])
    points = centres[clusters] + rng.normal(0, 0.6, (900, 2))
    load = rng.dirichlet(np.full(4, 6.0), 3)
    stages = [
        {
            "name": name,
            "pool": "low_memory" if name in ("seed", "submodels") else "head",
            "workers": 1,
            "seconds": 20.5 + i,
            "tokens": 360_000 if name in ("seed", "submodels", "finetune") else None,
            "worker_seconds": 20.5 + i,
            "dollars": 0.002,
            "loss": 4.2 - i / 10 if name in ("seed", "submodels", "finetune") else None,
            "perplexity": 60.5 if name in ("seed", "merge", "finetune") else None,
            "bits_per_byte": None,
        }
        for i, name in enumerate(STAGES)
    ]
    figures = {"documents": 120, "tokens": 48_000, "perplexity": 41.25, "bits_per_byte": 1.913}
    return {
        "name": "demo",
        "seed": 0,
        "tags": {},
        "family": "qwen3_moe",
        "stages": stages,
        "tokens": 1_080_000,
        "bill": bill().model_dump(mode="json"),
        "corpus": {},
        "clusters": {
            "clusters": [
                {
                    "documents": 300 + 10 * k,
                    "tokens": 200_000 + 9_000 * k,
                    "terms": ["license", "import", "return"],
                    "examples": [],
                }
                for k in range(4)
            ],
            "map": {
                "x": points[:, 0].tolist(),
                "y": points[:, 1].tolist(),
                "cluster": clusters.tolist(),
                "source": [SOURCES[int(c)] if rng.random() < 0.85 else SOURCES[int(rng.integers(4))] for c in clusters],
            },
        },
        "evaluation": {
            **figures,
            "clusters": [{"cluster": k, **figures} for k in range(4)],
            "sources": [{"source": source, **figures} for source in SOURCES],
            "routers": [{"layer": layer, "load": row.tolist()} for layer, row in enumerate(load)],
        },
        "samples": [{"prompt": "The", "text": "The license of the [bold]software[/bold] is"}],
        "curves": {
            "seed": curve("seed", 8.3, 5.6, 360_000),
            **{
                f"submodel-{k}": curve("submodels", 5.6 - k / 10, 4.4 + k / 4, 150_000 + 9_000 * k, seed=k)
                for k in range(4)
            },
            "finetune": curve("finetune", 5.2, 4.3, 240_000, seed=9),
        },
        "versions": {},
    }


def run_report():
    """The report as a record."""
    return RunReport.model_validate(report())


def events():
    """Every kind of event, a second apart."""

    def progress(stage, unit, step, steps):
        return Event(
            "progress",
            stage,
            unit,
            {
                "step": step,
                "steps": steps,
                "tokens": step * 2048,
                "loss": 8.0 * math.exp(-step / steps),
                "lr": 1e-3,
                "grad_norm": 0.7,
                "tokens_per_second": 10_240.0,
            },
        )

    sequence = [
        Event(
            "run_started",
            data={"id": "01ARZ3NDEKTSV4RRFFQ69G5FAV", "name": "demo", "directory": "runs/demo", "stages": STAGES},
        ),
        Event("stage_skipped", "corpus"),
        Event("stage_started", "seed"),
        progress("seed", "seed", 50, 100),
        progress("seed", "seed", 100, 100),
        Event("stage_finished", "seed", data={"seconds": 12.25, "summary": {}}),
        Event("stage_started", "cluster"),
        Event("stage_progress", "cluster", data={"done": 4000, "total": 10_000, "unit": "vectors"}),
        Event(
            "clusters", "cluster", data={"documents": [10, 20, 30, 40], "tokens": [100_000, 200_000, 300_000, 400_000]}
        ),
        Event("stage_finished", "cluster", data={"seconds": 3.0, "summary": {}}),
        Event("stage_started", "submodels"),
        progress("submodels", "submodel-0", 10, 100),
        progress("submodels", "submodel-1", 50, 100),
        Event("worker_restarted", "submodels", "submodel-1", {"reason": "its node went away"}),
        Event("warning", data={"message": "no GPU found"}),
        Event("run_failed", data={"message": "out of luck"}),
        Event("run_finished", data={"seconds": 75.0}),
    ]
    return [Event(e.type, e.stage, e.unit, e.data, 1_700_000_000.0 + i) for i, e in enumerate(sequence)]
