import dataclasses
import io
import json
import math
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moedisco_ray.cli.display import report_view
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.records.bill import format_dollars, format_seconds
from moedisco_ray.core.records.event_totals import CURVE_POINTS, EventTotals, thin
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.export_summary import ExportSummary
from moedisco_ray.core.records.findings import (
    cluster_rows,
    evaluation_rows,
    expert_note,
    learnt_notes,
    slope_note,
    start_note,
    task_table,
)
from moedisco_ray.core.records.report import (
    TABLE_COLUMNS,
    build_report,
    report_notes,
    report_of,
    report_speeds,
    report_table,
)
from moedisco_ray.core.records.run_record import Curve, RunReport
from moedisco_ray.core.records.summaries import CorpusSummary, EvaluationRecord
from moedisco_ray.core.records.ways import THIS_RUN, Alternative
from moedisco_ray.core.stages import STAGES, fingerprints
from moedisco_ray.core.store.artifacts import Manifest, write_json
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.stages.export.card import model_card

LOW, HIGH = 0.36, 3.6  # dollars per hour


def run_config(**changes):
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "seed": 7,
            "tags": {"team": "a"},
            "corpus": {"sources": [{"path": "embedded"}]},
            "clusters": {"count": 2},
            "pools": {
                "low_memory": {"price_per_hour": LOW, "max_workers": 2},
                "high_memory": {"price_per_hour": HIGH, "workers": 2},
            },
            **changes,
        }
    )


def unit(name, tokens, loss, worker_seconds, pool="low_memory", **changes):
    # The fine-tune's are those of a gang of two, a tenth of whose time was its start-up.
    return {
        "name": name,
        "steps": 1,
        "planned_steps": 1,
        "tokens": tokens,
        "loss": loss,
        "seconds": 0.45 * worker_seconds,
        "workers": 2.0 if pool == "high_memory" else 1.0,
        "held": {pool: worker_seconds},
        "contribution": "finished",
        "reason": None,
        **changes,
    }


SUMMARIES = {
    "corpus": (5.0, {"documents": 10, "tokens": 5000, "vocab_size": 300}),
    "seed": (20.0, {"units": [unit("seed", 1000, 4.0, 18.0)]}),
    "clusters": (2.0, {}),
    "decomposed": (1.0, {}),
    "submodels": (60.0, {"units": [unit("submodel-0", 3000, 3.0, 50.0), unit("submodel-1", 1000, 5.0, 30.0)]}),
    "merged": (3.0, {"layers": []}),
    "finetuned": (30.0, {"units": [unit("finetune", 500, 2.5, 50.0, "high_memory")]}),
    "evaluation": (4.0, {}),
    "model": (1.0, {"samples": [{"prompt": "The", "text": " cat"}]}),
}


EXPORTED = ExportSummary(parameters=1, active_parameters=1)
HELD_BY_TASKS = {
    "merged": [("high_memory", 3.0)],
    "evaluation": [("high_memory", 4.0)],
    "model": [("high_memory", 1.0)],
}


_FIGURES = {"workers": 1, "gap": 0.0, "memory_gb": 20.0, "limit": None}
WAYS = [
    Alternative(way="joint_high_memory", name="joint training on 1 x A100", seconds=200.0, dollars=0.8, **_FIGURES),
    Alternative(way="run", name=THIS_RUN, seconds=100.0, dollars=0.1, **_FIGURES),
]
"""The ways that the run's plan compared. It took 146 seconds instead of 100, and cost $0.0678 instead of $0.1."""


def write_run(directory, stages=tuple(SUMMARIES)):
    """Manifests, and the events of one attempt: every stage held its slots from its first second on."""
    log, now = EventLog(directory / "events.jsonl"), 1000.0
    log(Event("run_started", data={"ways": [way.model_dump(mode="json") for way in WAYS]}, time=now))
    digests = fingerprints(run_config())
    for number, name in enumerate(stages):
        seconds, summary = SUMMARIES[name]
        (directory / name).mkdir(parents=True)
        stage_name = next(each.name for each in STAGES if each.directory == name)
        manifest = Manifest(digests[stage_name], seconds, summary, {"maker": name}, float(number))
        write_json(directory / name / "manifest.json", with_checksum(dataclasses.asdict(manifest)))
        log(Event("stage_started", stage_name, time=now))
        began = now
        held = [item for unit in (*summary.get("units", ()), summary) for item in unit.get("held", {}).items()]
        for hold, (pool, worker_seconds) in enumerate(held or HELD_BY_TASKS.get(name, ())):
            workers = 2 if pool == "high_memory" and held else 1
            log(
                Event(
                    "workers_held",
                    stage_name,
                    data={"hold": f"{name}{hold}", "pool": pool, "workers": workers},
                    time=now,
                )
            )
            if held:
                log(Event("unit_started", stage_name, "u", {"steps": 1}, time=now + min(2.5, worker_seconds / workers)))
            now += worker_seconds / workers
            log(Event("workers_released", stage_name, data={"hold": f"{name}{hold}"}, time=now))
        now = max(now, began + seconds)
        log(Event("stage_finished", stage_name, data={"seconds": seconds, "summary": summary}, time=now))
    if len(stages) == len(SUMMARIES):
        log(Event("run_finished", data={"seconds": 0.0}, time=now))
    log.close()


@pytest.fixture
def report(tmp_path):
    write_run(tmp_path)
    write_json(tmp_path / "clusters" / "report.json", {"clusters": [{"documents": 6, "tokens": 9, "terms": ["a"]}]})
    write_json(
        tmp_path / "evaluation" / "evaluation.json",
        {
            "perplexity": 20.0,
            "stages": {"seed": {"perplexity": 50.0, "bits_per_byte": 2.5}, "finetune": {"perplexity": 20.0}},
        },
    )
    return build_report(tmp_path, run_config())


def stage(report, name):
    return next(entry for entry in report.stages if entry.name == name)


def test_stages_cost_worker_hours_at_their_pools_price(report):
    assert [entry.name for entry in report.stages] == [
        "corpus",
        "seed",
        "cluster",
        "decompose",
        "submodels",
        "merge",
        "finetune",
        "evaluate",
        "export",
    ]
    assert stage(report, "seed").dollars == pytest.approx(18 / 3600 * LOW)
    assert stage(report, "submodels").dollars == pytest.approx(80 / 3600 * LOW)
    assert stage(report, "finetune").dollars == pytest.approx(50 / 3600 * HIGH)
    assert stage(report, "merge").dollars == pytest.approx(3 / 3600 * HIGH)
    assert stage(report, "evaluate").dollars == pytest.approx(4 / 3600 * HIGH)
    assert stage(report, "export").dollars == pytest.approx(1 / 3600 * HIGH)
    for name in ("corpus", "cluster", "decompose"):
        assert stage(report, name).dollars == 0
    assert {entry.name for entry in report.stages if entry.pool == "head"} == {"corpus", "decompose"}


def test_clusters_cost_what_their_vectors_held(tmp_path, monkeypatch):
    monkeypatch.setitem(SUMMARIES, "clusters", (2.0, {"held": {"low_memory": 3.0}}))
    write_run(tmp_path)
    clusters = stage(build_report(tmp_path, run_config()), "cluster")
    assert (clusters.pool, clusters.worker_seconds) == ("low_memory", 3.0)
    assert clusters.dollars == pytest.approx(3 / 3600 * LOW)


def test_what_works_on_the_whole_model_is_where_it_is_fine_tuned(tmp_path):
    write_run(tmp_path)
    report = build_report(tmp_path, run_config(finetune={"pool": "low_memory"}))
    assert {entry.name for entry in report.stages if entry.pool == "low_memory"} == {
        "seed",
        "cluster",
        "submodels",
        "merge",
        "finetune",
        "evaluate",
        "export",
    }


MEASURED = {
    "perplexity": 20.0,
    "bits_per_byte": 2.0,
    "documents": 4,
    "tokens": 50,
    "stages": {},
    "routers": [{"layer": 0, "load": [0.999, 0.001], "dead": 1}, {"layer": 1, "load": [0.5, 0.5], "dead": 0}],
    "specialisation": {"cluster": 0.25, "source": None},
    "unseen": {
        "perplexity": 33.25,
        "bits_per_byte": 2.5,
        "documents": 2,
        "tokens": 20,
        "trained_on": 1,
        "sources": [
            {"source": "wiki", "perplexity": 31.0, "bits_per_byte": 2.4, "documents": 1, "tokens": 10},
            {"source": "law", "perplexity": 35.0, "bits_per_byte": 2.6, "documents": 1, "tokens": 10},
        ],
    },
    "lm_eval": [
        {
            "task": "facts",
            "examples": 1200,
            "acc": 0.31,
            "acc_stderr": 0.0134,
            "acc_norm": 0.355,
            "acc_norm_stderr": 0.014,
            "chance": 0.25,
        },
        {
            "task": "ends",
            "examples": 1,
            "acc": 0.0,
            "acc_stderr": None,
            "acc_norm": None,
            "acc_norm_stderr": None,
            "chance": None,
        },
    ],
}

EVALUATION = EvaluationRecord.model_validate(MEASURED)


def test_text_by_name_tasks_and_experts_as_they_are_shown():
    assert [name for name, _ in evaluation_rows(EVALUATION)] == [
        "all",
        "all, never trained on",
        "wiki, never trained on",
        "law, never trained on",
    ]
    alone = EvaluationRecord.model_validate({"unseen": {"sources": [{"source": "wiki"}]}})
    assert [name for name, _ in evaluation_rows(alone)] == ["wiki, never trained on"]
    assert task_table(EVALUATION) == [
        ("facts", "0.310 ± 0.013", "0.355 ± 0.014", "0.250", "1,200"),
        ("ends", "0.000", "-", "-", "1"),
    ]
    assert expert_note(EVALUATION) == (
        "normalised mutual information of a document's main expert: 0.25 with its cluster; "
        "1 of 4 experts are dead (under 1 % of an even load)"
    )
    copies = {**MEASURED, "routers": [{**router, "similarity": 0.99} for router in MEASURED["routers"]]}
    note = expert_note(EvaluationRecord.model_validate(copies))
    assert note is not None
    assert "warning: the experts of a layer are nearly copies of each other (cosine 0.99)" in note
    nothing = EvaluationRecord()
    assert (task_table(nothing), evaluation_rows(nothing), expert_note(nothing)) == ([], [], None)


def test_figures_come_with_what_they_mean():
    evaluation = EvaluationRecord(
        bits_per_byte=1.5,
        xz_bits_per_byte=2.25,
        load_by_source={"wiki": [0.5, 0.3, 0.2], "law": [0.2, 0.3, 0.5], "code": [0.2, 0.6, 0.2]},
    )
    corpus = CorpusSummary(tokens=1000)
    assert learnt_notes(evaluation, corpus, 2500) == [
        "1.50 bits per byte of held-out text, where xz needs 2.25: the model has learnt more than repetitions",
        "the text was read 2.5 times",
        "expert 0 takes 50% of the selections on wiki, and 20% on other sources",
        "expert 2 takes 50% of the selections on law, and 20% on other sources",
        "expert 1 takes 60% of the selections on code, and 30% on other sources",
    ]
    little, often = learnt_notes(EvaluationRecord(bits_per_byte=2.5, xz_bits_per_byte=2.25), corpus, 9000)
    assert little.endswith("the model has not yet learnt more than repetitions; train on more tokens")
    assert often == (
        "the text was read 9.0 times; up to 4 are nearly as good as new text, and more than 16 gain little: add text, "
        "or lower tokens.total"
    )
    assert learnt_notes(EvaluationRecord(), corpus, 23) == ["the text was read 0.023 times"]
    even = EvaluationRecord(load_by_source={"wiki": [0.5, 0.5], "law": [0.45, 0.55]})
    assert learnt_notes(even, CorpusSummary(), 9000) == []


def losses(slope, noise=0.0, first=0, points=60):
    """A loss that changes by `slope` with each doubling of a run's 600 tokens, the whole model's from `first` on."""
    tokens = [first + (600 - first) * (i + 1) // points for i in range(points)]
    loss = [5 + slope * math.log2(count) + noise * (-1) ** i for i, count in enumerate(tokens)]
    return Curve(stage="finetune", tokens=[count - first for count in tokens], loss=loss)


def test_the_slope_says_what_the_last_third_gained_and_twice_the_tokens_would():
    assert slope_note(losses(-0.2), 600, 5400.0) == (
        "over the last third of the tokens, 30 min 00 s, the training loss fell by 0.12; twice the tokens: about -0.20"
    )
    assert slope_note(losses(-0.2, first=300), 600, 2700.0) == slope_note(losses(-0.2), 600, 5400.0)
    nothing = (losses(0.1), losses(-0.01, noise=1.0), losses(-0.2, first=500), losses(-0.2, points=6), None)
    assert [slope_note(curve, 600, 5400.0) for curve in nothing] == [None] * 5
    broken = losses(-0.2)
    broken.loss[-1] = math.inf
    assert "fell by 0.1" in (slope_note(broken, 600, 5400.0) or "")


def test_the_start_stands_next_to_the_result_and_a_sentence_says_whether_the_run_helped():
    figures = {"loss": 4.0, "perplexity": 54.6, "documents": 9, "tokens": 90}
    measured = EvaluationRecord.model_validate(
        {
            **figures,
            "loss": 3.25,
            "sources": [{"source": "wiki", "loss": 3.0}, {"source": "allenai", "loss": 5.5}],
            "clusters": [{"cluster": 1, "loss": 3.5}],
            "start": {
                **figures,
                "sources": [{"source": "wiki", "loss": 4.5}, {"source": "allenai", "loss": 5.0}],
                "clusters": [{"cluster": 1, "loss": 3.75}],
            },
            "unseen": {
                "sources": [{"source": "news", "loss": 6.0}],
                "start": {"sources": [{"source": "news", "loss": 5.75}]},
            },
        }
    )
    assert [(name, entry.loss) for name, entry in evaluation_rows(measured)] == [
        ("all", 3.25),
        ("all, with the start model", 4.0),
        ("wiki", 3.0),
        ("wiki, with the start model", 4.5),
        ("allenai", 5.5),
        ("allenai, with the start model", 5.0),
        ("news, never trained on", 6.0),
        ("news, never trained on, with the start model", 5.75),
    ]
    assert [(name, entry.loss) for name, entry in cluster_rows(measured)] == [
        ("cluster 1", 3.5),
        ("cluster 1, with the start model", 3.75),
    ]
    assert start_note(measured) == (
        "the held-out loss is 3.2500 nats per token, 0.7500 below the 4.0000 of the model that the run started from; "
        "allenai, news got worse"
    )
    assert "0.2500 above the 4.0000" in str(start_note(measured.model_copy(update={"loss": 4.25, "sources": []})))
    assert start_note(EvaluationRecord.model_validate(figures)) is None


def test_show_and_the_card_have_what_was_measured_beside_the_validation_text(tmp_path):
    write_run(tmp_path)
    write_json(tmp_path / "evaluation" / "evaluation.json", MEASURED)
    report = build_report(tmp_path, run_config())
    console = Console(file=io.StringIO(), width=120)
    console.print(report_view(report))
    shown = console.file.getvalue()
    card = model_card(report, EXPORTED)
    for text in ("law, never trained on", "33.25", "0.310 ± 0.013", "1 of 4 experts are dead"):
        assert text in shown
        assert text in card
    assert "## Tasks" in card


def test_figures_of_a_stage(report):
    submodels = stage(report, "submodels")
    assert submodels.tokens == 4000
    assert submodels.loss == pytest.approx((3 * 3000 + 5 * 1000) / 4000)
    assert submodels.workers == 2
    assert submodels.seconds == 60.0
    assert submodels.pool == "low_memory"
    assert stage(report, "finetune").workers == 2
    assert stage(report, "seed").perplexity == 50.0
    assert stage(report, "seed").bits_per_byte == 2.5
    assert stage(report, "submodels").perplexity is None
    assert stage(report, "corpus").tokens is None


def test_the_bill_has_every_priced_second(report):
    bill = report.bill
    assert report.tokens == 5500
    assert bill.seconds == pytest.approx(146.0)
    assert bill.dollars == pytest.approx(sum(entry.dollars for entry in report.stages))
    assert bill.dollars == pytest.approx((98 * LOW + (3 + 50 + 4 + 1) * HIGH) / 3600)
    assert bill.saving == pytest.approx(1 - 0.1 / 0.8)
    assert bill.baseline.dollars == pytest.approx(8 * bill.dollars)
    assert bill.baseline.seconds == pytest.approx(2 * 146.0)


def test_the_rest_of_the_run(report):
    assert (report.name, report.seed, report.tags, report.family) == ("tiny", 7, {"team": "a"}, "qwen3_moe")
    assert report.corpus.vocab_size == 300
    assert report.clusters.clusters[0].terms == ["a"]
    assert report.evaluation.perplexity == 20.0
    assert [(sample.prompt, sample.text) for sample in report.samples] == [("The", " cat")]
    assert report.versions == {"maker": "model"}
    assert RunReport.model_validate_json(json.dumps(report.to_json(), allow_nan=False)) == report


def test_an_unfinished_run_has_a_report(tmp_path):
    write_run(tmp_path, ("corpus", "seed"))
    report = build_report(tmp_path, run_config())
    assert [entry.name for entry in report.stages] == ["corpus", "seed"]
    assert (report.bill.baseline, report.bill.saving, report.bill.verdict) == (None, None, None)
    assert report.evaluation.is_empty
    assert (report.clusters.clusters, report.curves) == ([], {})
    assert len(report_table(report)) == 3


def test_an_empty_run_has_a_report(tmp_path):
    report = build_report(tmp_path, run_config())
    assert report.stages == []
    assert (report.tokens, report.bill.dollars) == (0, 0)
    assert "python" in report.versions


def test_a_seed_without_training_costs_nothing_but_its_time(tmp_path):
    (tmp_path / "seed").mkdir()
    manifest = Manifest("f", 2.0, {"units": []}, {}, 0.0)
    write_json(tmp_path / "seed" / "manifest.json", with_checksum(dataclasses.asdict(manifest)))
    seed = build_report(tmp_path, run_config()).stages[0]
    assert seed.tokens == 0
    assert seed.loss is None


def test_the_table(report):
    rows = report_table(report)
    assert all(len(row) == len(TABLE_COLUMNS) for row in rows)
    assert rows[0] == ("corpus", "head", "1", "-", "5.0 s", "$0.00", "-", "-")
    assert rows[1] == ("seed", "low-memory", "1", "1,000", "20.0 s", "$0.0018", "4.0000", "50.00")
    assert rows[-2] == ("total", "", "", "5,500", "2 min 26 s", "$0.0678", "", "")
    assert rows[-1] == ("joint training on 1 x A100 (estimate)", "", "", "5,500", "4 min 52 s", "$0.5424", "", "")


def progress(log, name, step, loss, stage_name="submodels", **more):
    log(Event("progress", stage_name, name, {"step": step, "tokens": step * 10, "loss": loss, **more}))


def test_curves_follow_the_unit_that_went_back(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log(Event("run_started", data={"name": "tiny"}))
    for step in (1, 2, 3, 4):
        progress(log, "submodel-0", step, 10.0 - step)
    progress(log, "submodel-1", 1, 7.0)
    for step in (3, 5):  # resumed from the checkpoint after step 2
        progress(log, "submodel-0", step, 20.0 - step)
    progress(log, "finetune", 2, 1.5, stage_name="finetune")
    log.close()
    curves = EventTotals(EventLog.read(tmp_path / "events.jsonl")).losses.curves()
    assert {name: curve.to_json() for name, curve in curves.items()} == {
        "submodel-0": {"stage": "submodels", "tokens": [10, 20, 30, 50], "loss": [9.0, 8.0, 17.0, 15.0]},
        "submodel-1": {"stage": "submodels", "tokens": [10], "loss": [7.0]},
        "finetune": {"stage": "finetune", "tokens": [20], "loss": [1.5]},
    }


def test_long_curves_are_thinned(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(1, 1202):
        progress(log, "seed", step, float(step), stage_name="seed")
    log.close()
    curve = EventTotals(EventLog.read(tmp_path / "events.jsonl")).losses.curves()["seed"]
    assert len(curve.tokens) == len(curve.loss) == CURVE_POINTS
    assert (curve.tokens[0], curve.tokens[-1]) == (10, 12_010)


def test_a_long_log_needs_little_more_memory_than_its_file():
    """The service has a gigabyte, and reads logs of up to 256 MiB."""
    figures = {"steps": 50_000, "loss": 3.2, "lr": 1e-4, "grad_norm": 1.2, "tokens_per_second": 12_345.0, "mfu": 0.25}
    lines = [
        Event("progress", "submodels", "submodel-0", {"step": step, "tokens": 2000 * step, **figures}).to_json()
        for step in range(10_000)
    ]
    files = {"events.jsonl": "\n".join(lines).encode()}
    report_of(files.get, run_config())  # what is computed once is not counted below
    tracemalloc.start()
    report = report_of(files.get, run_config())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(report.curves["submodel-0"].tokens) == CURVE_POINTS
    assert most < len(files["events.jsonl"]) / 3


def test_the_share_for_which_trainings_stood_still_to_save(tmp_path):
    write_run(tmp_path)
    log = EventLog(tmp_path / "events.jsonl")
    for name, stall in (("submodel-0", 1.5), ("submodel-1", 0.3), ("submodel-0", 1.8)):
        log(Event("checkpoint", "submodels", name, {"step": 5, "stall": stall, "latency": 2.0}))
    log.close()
    report = build_report(tmp_path, run_config())
    assert stage(report, "submodels").stalled == pytest.approx(3.6 / (0.45 * 80))
    assert stage(report, "seed").stalled == 0
    assert stage(report, "corpus").stalled is None


@given(st.integers(0, 2000), st.integers(2, 500))
def test_thinning_keeps_ends_and_order(count, most):
    kept = thin(range(count), most)
    assert len(kept) == min(count, most)
    assert list(kept) == sorted(set(kept))
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (60, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7800, "2 h 10 min"),
        (7229.6, "2 h 00 min"),
    ],
)
def test_durations(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("dollars", "text"), [(0, "$0.00"), (0.00214, "$0.0021"), (0.25, "$0.2500"), (1234.5, "$1,234.50")]
)
def test_dollars(dollars, text):
    assert format_dollars(dollars) == text


def test_the_report_needs_nothing_heavy():
    look = "print([m for m in ('torch', 'ray', 'numpy', 'transformers') if m in sys.modules])"
    heavy = f"import sys, moedisco_ray.core.records.report; {look}"
    assert (
        subprocess.run([sys.executable, "-c", heavy], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_node_types_and_what_was_not_waited_for(tmp_path, monkeypatch):
    units = [
        unit("submodel-0", 3000, 3.0, 0, held={"low_memory.t4": 3600.0, "low_memory.l4": 1800.0}),
        unit(
            "submodel-1",
            500,
            4.0,
            3600.0,
            "low_memory.l4",
            steps=5,
            planned_steps=10,
            contribution="checkpoint",
            reason="its time was up",
        ),
        unit("submodel-2", 0, None, 0.0, steps=0, planned_steps=10, contribution="seed", reason="failed 4 times"),
    ]
    monkeypatch.setitem(SUMMARIES, "submodels", (60.0, {"units": units}))
    write_run(tmp_path)
    types = [
        {"name": name, "resource": name, "memory_gb": 16, "price_per_hour": price, "speed": 1}
        for name, price in (("t4", 0.5), ("l4", 4.0))
    ]
    report = build_report(tmp_path, run_config(pools={"low_memory": {"types": types}}))
    submodels = stage(report, "submodels")
    assert submodels.dollars == pytest.approx(0.5 + 2.0 + 4.0)
    assert submodels.worker_seconds == pytest.approx(9000)
    assert (submodels.tokens, submodels.loss) == (3500, pytest.approx((3 * 3000 + 4 * 500) / 3500))
    assert [entry.name for entry in submodels.unfinished] == ["submodel-1", "submodel-2"]
    assert report_notes(report) == [
        "submodel-1 is not finished: the merge took its checkpoint of step 5 of 10 (its time was up)",
        "submodel-2 is not finished: the merge took its seed, untrained (failed 4 times)",
    ]
    assert RunReport.model_validate_json(json.dumps(report.to_json(), allow_nan=False)) == report
    for text in (shown(report), model_card(report, EXPORTED)):
        assert "ubmodel-1 is not finished: the merge took its checkpoint of step 5 of 10 (its time was up)" in text


def speeds(report):
    """The notes of the trainings' speed."""
    return [
        f"{each.name} trained {each.tokens / each.training_worker_seconds:,.0f} tokens/s per worker"
        for each in report.stages
        if each.tokens
    ]


def test_a_run_that_waited_for_all_has_nothing_to_note_but_its_speed(report):
    assert stage(report, "submodels").unfinished == report_notes(report) == []
    assert report_speeds(report) == speeds(report) != []


def test_the_share_of_the_cards_peak_is_the_mean_of_what_trainings_reported(tmp_path):
    write_run(tmp_path)
    log = EventLog(tmp_path / "events.jsonl")
    for share in (0.5, 0.3):
        progress(log, "submodel-0", 1, 3.0, mfu=share)
    log.close()
    report = build_report(tmp_path, run_config())
    assert stage(report, "submodels").mfu == pytest.approx(0.4)
    assert stage(report, "seed").mfu is None
    assert any(note.endswith("tokens/s per worker, 40 % of the cards' peak (MFU)") for note in report_speeds(report))


def shown(report):
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(report_view(report))
    return console.file.getvalue()


def test_idle_slots_are_shown_at_their_pools_price_and_in_no_other_figure(tmp_path):
    write_run(tmp_path)
    without = build_report(tmp_path, run_config())
    log = EventLog(tmp_path / "events.jsonl")
    for event in (
        Event("slots_free", data={"pool": "high_memory", "slots": 2}, time=10_100.0),
        Event("slots_free", data={"pool": "high_memory", "slots": 0}, time=11_900.0),
        Event("run_finished", data={"seconds": 1.0}, time=12_000.0),
    ):
        log(event)
    log.close()
    report = build_report(tmp_path, run_config())
    idle = {"stage": "idle", "pool": "high_memory", "worker_seconds": 3600.0, "dollars": pytest.approx(HIGH)}
    assert report.bill.model_dump(mode="json") == without.bill.model_dump(mode="json") | {
        "idle": [idle],
        "idle_dollars": pytest.approx(HIGH),
        "dollars_with_idle": pytest.approx(without.bill.dollars + HIGH),
    }
    *before, full = report_table(without)
    assert report_table(report) == [
        *before,
        ("idle machines", "high-memory", "", "", "1 h 00 min", "$3.60", "", ""),
        ("total with idle machines", "", "", "", "", "$3.67", "", ""),
        full,
    ]


def test_a_gang_whose_size_changed_counts_its_workers_on_average(tmp_path, monkeypatch):
    grown = unit("finetune", 500, 2.5, 60.0, "high_memory", seconds=20.0, workers=1.5)
    monkeypatch.setitem(SUMMARIES, "finetuned", (30.0, {"units": [grown]}))
    write_run(tmp_path)
    finetune = next(entry for entry in build_report(tmp_path, run_config()).stages if entry.name == "finetune")
    assert (finetune.workers, finetune.training_worker_seconds, finetune.worker_seconds) == (1.5, 30.0, 60.0)
