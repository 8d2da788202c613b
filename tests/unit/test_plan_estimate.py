"""What a plan says of time and money: every stage, at a speed that is measured, assumed with its source, or unknown."""

from __future__ import annotations

import dataclasses
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from run_example import run_report
from small_run import small_config

from moedisco_ray.core.cards import PEAK_FLOPS, UTILISATION
from moedisco_ray.core.config import Source, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.errors import ConfigError, RunDirError
from moedisco_ray.core.records.bill import Bill, format_dollars
from moedisco_ray.core.records.events import BILL_FIGURES, EventLog
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.report import build_report
from moedisco_ray.core.records.ways import NOT_COMPARED
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.text_size import MOST_ENTRIES, listed_bytes
from moedisco_ray.plan import build_plan, estimate, machine, storage
from moedisco_ray.plan.measured_speed import with_measured_speed
from moedisco_ray.plan.speed import START_UP, Machine, Probe, Trial
from moedisco_ray.stages.corpus.files import list_files


def probe(rate=50e9, start_up=4.0, cores=2):
    trials = tuple(
        Trial(experts=experts, flops_per_token=size, flops_per_second=rate) for experts in (1, 4) for size in (1e6, 1e7)
    )
    return Probe(cores=cores, versions={}, trials=trials, start_up_seconds=start_up, text_bytes_per_second=1e6)


def preset(name, **changes):
    return check_config(yaml.safe_load(preset_text(name)) | changes)


DEMO = preset("demo")
HERE = Machine(probe=probe(), text_bytes=10_000_000)


def by_stage(plan):
    return {each.stage: each for each in plan.estimates}


def test_a_plan_has_time_and_money_of_every_stage_with_start_ups():
    plan = build_plan(DEMO, HERE)
    assert [each.stage for each in plan.estimates] == [stage.name for stage in STAGES]
    assert all(each.seconds > 0 for each in plan.estimates)
    priced = {each.stage for each in plan.estimates if each.dollars}
    assert priced == {"seed", "cluster", "submodels", "merge", "finetune", "evaluate", "export"}
    assert plan.bill.dollars == pytest.approx(sum(each.dollars for each in plan.estimates))
    seed = next(stage for stage in plan.stages if stage.stage == "seed")
    assert by_stage(plan)["seed"].worker_seconds == pytest.approx(seed.cost.flops / 50e9 + 4.0)
    # The four sub-models train on the two processes that have computed the documents' vectors.
    submodels = by_stage(plan)["submodels"]
    flops = next(stage for stage in plan.stages if stage.stage == "submodels").cost.flops
    assert submodels.worker_seconds == pytest.approx(flops / 50e9)
    assert submodels.seconds == pytest.approx(flops / 50e9 / 2)
    # The merge is the first stage on the other pool.
    begun = [each.stage for each in plan.estimates if (each.worker_seconds or 0.0) >= 4.0]
    assert {"seed", "merge"} <= set(begun)
    assert by_stage(plan)["export"].worker_seconds < 4.0


def test_a_gang_starts_anew_and_so_does_the_stage_after_it():
    gang = {"gpu": 1, "price_per_hour": 2.28, "workers": 8}
    plan = by_stage(build_plan(with_gpus(pools__high_memory=gang), HERE))
    assert plan["finetune"].unbilled_seconds == START_UP  # of Ray Train's controller
    assert plan["finetune"].worker_seconds > START_UP * 8
    assert plan["evaluate"].worker_seconds > START_UP
    assert plan["export"].worker_seconds < 1.0  # on the process that has evaluated


@pytest.mark.parametrize("planned", [estimate, storage], ids=["time", "storage"])
def test_a_stage_whose_cost_nobody_planned_is_an_error_and_not_0_dollars(planned, monkeypatch):
    monkeypatch.setattr(
        planned,
        "STAGES",
        (*STAGES, dataclasses.replace(STAGES[-1], name="distil", cost="moedisco_ray.plan.stages.distil:COST")),
    )
    with pytest.raises(LookupError, match="planned for stage distil"):
        build_plan(DEMO, HERE)


def test_a_plan_has_memory_disk_and_traffic_of_every_stage_and_of_joint_training():
    plan = build_plan(with_gpus(pools__high_memory={"gpu": 1, "price_per_hour": 2.28, "workers": 2}), HERE)
    assert [each.stage for each in plan.storage] == [stage.name for stage in STAGES]
    for each in (*plan.storage, plan.joint_training_storage):
        assert each.moved > 0
        assert each.node_disk + each.worker_disk > 0
        assert each.device_memory + each.worker_memory > 0
        assert (each.stored > 0) == (each.stage != "evaluate")
    joint, finetune = plan.joint_training_storage, next(each for each in plan.storage if each.stage == "finetune")
    assert (joint.stored, joint.checkpoints, joint.device_memory) == (
        finetune.stored,
        finetune.checkpoints,
        finetune.device_memory,
    )
    steps = next(each.steps for each in plan.stages if each.stage == "finetune")
    assert joint.exchanged == finetune.exchanged // steps * plan.joint_training.steps > finetune.exchanged > 0
    assert joint.moved > finetune.moved


def test_an_untrained_seed_is_stored_too():
    plan = build_plan(with_gpus(tokens__seed_share=0.0, clusters__vectors="mean_token"), HERE)
    stored = {each.stage: each.stored for each in plan.storage}
    assert 0 < stored["seed"] < stored["submodels"]


def test_merge_and_evaluation_read_every_submodel_with_its_backbone():
    stored = {each.stage: each for each in build_plan(with_gpus(finetune__keep_optimizer_state=False), HERE).storage}
    assert stored["merge"].moved == stored["submodels"].stored + stored["merge"].stored
    assert stored["evaluate"].moved > stored["submodels"].stored + stored["merge"].stored + stored["finetune"].stored


def test_a_plan_for_cpu_workers_is_not_arithmetic_on_a_gpu():
    """The demo's pools claim a two-thousandth of an A100; what counts is what the machine was measured to do."""
    slow, fast = (build_plan(DEMO, Machine(probe=probe(rate), text_bytes=1)) for rate in (5e9, 50e9))
    assert slow.bill.dollars > 4 * fast.bill.dollars
    assert slow.training_dollars == fast.training_dollars  # what comparisons weigh is the same on every machine
    assert [speed.source for speed in slow.speeds] == ["measured here, 2 cores"] * 2


def test_a_speed_that_is_not_known_is_never_a_number():
    plan = build_plan(DEMO)
    assert (plan.bill.dollars, plan.bill.seconds, plan.bill.baseline, plan.bill.verdict) == (None, None, None, None)
    assert all(each.dollars is None and each.seconds is None for each in plan.estimates if each.pool != "head")
    assert all(speed.source.startswith("unknown") for speed in plan.speeds)


def test_gpu_pools_say_what_is_assumed_and_where_it_is_from():
    plan = build_plan(preset("default").model_copy(update={"recipe": None}))
    assert plan.bill.dollars > plan.training_dollars
    low, high = (speed.source for speed in plan.speeds)
    assert low.startswith(
        "L4, 121 TFLOP/s x 30% for dense models (assumed), 15% for several experts per layer (assumed)"
    )
    assert high.startswith("A100-80GB, 312 TFLOP/s x 50% for dense models (published), 20% for several experts")
    unnamed = build_plan(preset("paper", pools={"low_memory": {"gpu": 1}, "high_memory": {"gpu": 1}}))
    assert all("A100 data sheet" in speed.source and "35%" in speed.source for speed in unnamed.speeds)
    seed = next(stage for stage in plan.stages if stage.stage == "seed")
    assert by_stage(plan)["seed"].worker_seconds == pytest.approx(3600 * seed.cost.worker_hours + seed.units * START_UP)
    assert by_stage(plan)["corpus"].seconds is None
    assert plan.bill.seconds is None  # the size of its text is not known here


def test_the_baseline_is_the_cheapest_other_way_that_is_not_known_to_be_worse():
    for plan in (build_plan(DEMO, HERE), build_plan(with_gpus(), HERE)):
        *others, run = plan.alternatives
        priced = [way for way in others if way.dollars and way.way not in NOT_COMPARED]
        alike = [way for way in priced if (way.gap or 0) <= (run.gap or 0)]
        cheapest = min(alike, key=lambda way: (way.dollars, way.seconds))
        baseline = plan.bill.baseline
        assert (baseline.name, baseline.dollars, baseline.seconds) == (
            cheapest.name,
            cheapest.dollars,
            cheapest.seconds,
        )
        assert plan.bill.saving == pytest.approx(1 - plan.bill.dollars / cheapest.dollars)
        assert plan.bill.verdict == plan.verdict


@pytest.mark.parametrize("types", [(), ("small",)])
@pytest.mark.parametrize("gpu", [0, 1])
def test_the_plan_has_the_price_of_the_owners_machines(gpu, types):
    def planned(price):
        owners = {
            "alice": {"storage": "/a", "resource": "a_gpu", "price_per_hour": price},
            "bob": {"storage": "/b", "resource": "b_gpu"},
        }
        low = {
            "gpu": gpu,
            "price_per_hour": 0.5,
            "max_workers": 2,
            "types": [
                {"name": name, "resource": name, "memory_gb": 80, "price_per_hour": 0.2, "speed": 0.1} for name in types
            ],
        }
        sources = [{"path": "embedded"}, *({"path": f"/text/{name}.jsonl", "owner": name} for name in owners)]
        return build_plan(
            check_config(
                {
                    "name": "x",
                    "corpus": {"sources": sources},
                    "clusters": {"count": 4},
                    "finetune": {"keep_optimizer_state": False},
                    "pools": {"low_memory": low, "high_memory": {"gpu": gpu}, "owners": owners},
                }
            ),
            HERE,
        )

    def lines(plan):
        return {line.pool: line for line in plan.bill.lines if line.stage == "submodels"}

    paid, free = planned(3.0), planned(0.0)
    pool = "low_memory.small" if types else "low_memory"
    assert list(lines(paid)) == [pool, "owners.alice", "owners.bob"]
    alice, bob = lines(paid)["owners.alice"], lines(paid)["owners.bob"]
    assert alice.worker_seconds == pytest.approx(bob.worker_seconds)
    assert alice.dollars == pytest.approx(3.0 * alice.worker_seconds / 3600)
    assert bob.dollars == pytest.approx(0.5 * bob.worker_seconds / 3600)  # the price of the low-memory pool
    assert lines(free)["owners.alice"].dollars == 0
    assert paid.bill.dollars - free.bill.dollars == pytest.approx(alice.dollars)
    [stage] = (stage for stage in paid.stages if stage.stage == "submodels")
    # at the low-memory pool's own speed
    hours = stage.cost.flops / stage.units / (PEAK_FLOPS * UTILISATION * 0.72) / 3600
    assert paid.training_dollars - free.training_dollars == pytest.approx(3.0 * hours)
    assert lines(paid)[pool].worker_seconds / 2 == pytest.approx(bob.worker_seconds, rel=0.01) or (gpu and types)
    assert [share.units for share in stage.types] == ([2] if types else [])


def test_a_plan_and_a_report_have_the_same_structure(tmp_path):
    planned, metered = build_plan(DEMO, HERE).bill, build_report(tmp_path, DEMO).bill
    assert planned.model_dump().keys() == metered.model_dump().keys() == Bill.model_fields.keys()


@settings(max_examples=30)
@given(st.floats(1e9, 1e12), st.floats(1.1, 10), st.floats(0, 30))
def test_a_faster_machine_never_costs_more_and_a_slower_start_never_less(rate, times, start_up):
    def dollars(**changes):
        return build_plan(DEMO, Machine(probe=probe(**changes), text_bytes=1)).bill.dollars

    assert dollars(rate=rate * times, start_up=start_up) <= dollars(rate=rate, start_up=start_up)
    assert dollars(rate=rate, start_up=start_up + 1) > dollars(rate=rate, start_up=start_up)


@given(st.floats(1e5, 1e9), st.integers(1, 8))
def test_a_rate_between_two_measured_sizes_is_between_their_rates(size, experts):
    trials = [
        Trial(experts=e, flops_per_token=f, flops_per_second=r)
        for e, scale in ((1, 1.0), (4, 0.5))
        for f, r in ((1e6, scale * 20e9), (1e7, scale * 60e9), (1e8, scale * 80e9))
    ]
    found = probe().model_copy(update={"trials": tuple(trials)}).rate(size, experts)
    scale = 1.0 if experts == 1 else 0.5
    assert scale * 20e9 * (1 - 1e-9) <= found <= scale * 80e9 * (1 + 1e-9)


def test_text_that_is_not_here_has_no_size(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("x" * 11)

    def size(*paths):
        sources = [{"path": path, "name": f"s{number}"} for number, path in enumerate(paths)]
        config = preset("demo", corpus={"sources": sources})
        return machine.known_machine(config, here=False, listed=listed_bytes).text_bytes

    assert size(str(tmp_path), f"{tmp_path}/*.txt", str(tmp_path / "a.txt")) == 111 + 100 + 100
    assert size(str(tmp_path), "s3://bucket/x") is None
    assert size(f"{tmp_path}/*.none") is None
    (tmp_path / "c.jsonl.gz").write_bytes(b"x" * 10)
    assert size(str(tmp_path / "c.jsonl.gz")) == 40


def test_a_plan_counts_the_text_that_a_run_reads(tmp_path):
    """Before: hidden files, a README next to tables, what settings leave out, and links in a circle counted."""
    (tmp_path / "rows").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {
        "README.md": "x" * 1000,
        "rows/train-00000-of-00001.jsonl": "x" * 30,
        "rows/test-00000-of-00001.jsonl": "x" * 70,
        ".git/objects.txt": "x" * 5000,
    }.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "rows" / "up").symlink_to(tmp_path)

    def size(**settings):
        config = preset("demo", corpus={"sources": [{"path": str(tmp_path), **settings}]})
        return machine.known_machine(config, here=False, listed=listed_bytes).text_bytes

    files = list_files("corpus.sources.0", Source(path=str(tmp_path))).files
    assert size() == sum(file.size for file in files) == 100
    assert size(split="train") == 30
    assert size(exclude=["test-*"]) == 30
    assert size(format="text") == 1100


def test_the_time_to_count_text_is_bounded(tmp_path, monkeypatch):
    """Before: a folder was listed to its end, whatever the number of its files."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("x")
    source = Source(path=str(tmp_path))
    assert MOST_ENTRIES == 10_000
    assert listed_bytes("--text", source) == 30
    monkeypatch.setattr("moedisco_ray.execution.text_size.MOST_ENTRIES", 29)
    monkeypatch.setattr("pyarrow.fs.FileSelector", lambda folder: pytest.fail(f"{folder} was listed"))
    assert listed_bytes("--text", source) is None


def test_at_the_speed_that_a_run_has_measured_its_plan_states_the_time_of_its_trainings(tmp_path):
    done = run_report()
    done = done.model_copy(
        update={
            "stages": [
                stage.model_copy(update={"training_worker_seconds": 500.0 + number})
                for number, stage in enumerate(done.stages)
            ]
        }
    )
    config = small_config(
        tmp_path / "runs",
        tokens={"total": 60_000, "seed_share": 0.4, "finetune_share": 0.3},
        pools={"low_memory": {"gpu": 1, "max_workers": 2, "seed_workers": 2}, "high_memory": {"gpu": 1, "workers": 2}},
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config.model_dump_json())
    (run / "report.json").write_text(done.model_dump_json())
    measured, pools = with_measured_speed(config, str(run))
    assert pools == ("low_memory", "high_memory")
    plan = build_plan(measured, Machine(measured=dict.fromkeys(pools, "in RUN")))
    assert all(speed.source.startswith("measured in RUN: ") for speed in plan.speeds)
    planned, trained = {stage.stage: stage for stage in plan.stages}, {stage.name: stage for stage in done.stages}
    for stages in (("seed", "submodels"), ("finetune",)):
        hours = sum(
            planned[stage].cost.worker_hours / planned[stage].cost.tokens * trained[stage].tokens for stage in stages
        )
        assert 3600 * hours == pytest.approx(sum(trained[stage].training_worker_seconds for stage in stages))
    (run / "config.json").write_text(small_config(tmp_path / "runs").model_dump_json())
    with pytest.raises(ConfigError, match=r"--measured: .*of GPUs of one type"):
        with_measured_speed(config, str(run))
    with pytest.raises(RunDirError, match="holds no run"):
        with_measured_speed(config, str(tmp_path / "none"))


@pytest.mark.slow
def test_a_plan_is_close_to_the_time_that_a_run_takes(tmp_path, monkeypatch):
    """By CPU time of the process, which other work on the machine does not change much; the probe measures the same."""
    monkeypatch.setenv("MOEDISCO_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 256,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
    }
    config = small_config(
        tmp_path / "runs",
        tokens={"total": 36_000, "seed_share": 0.4, "finetune_share": 0.3},
        model={"family": "qwen3_moe", "config": sizes},
    )
    known = machine.measured_machine(config, here=True)
    assert known.probe is not None
    assert machine.measure() == known.probe  # cached
    plan = build_plan(config, Machine(probe=known.probe.model_copy(update={"start_up_seconds": 0.0}), text_bytes=1))
    planned = by_stage(plan)
    spent, began = {}, 0.0

    def listen(event):
        nonlocal began
        if event.type == "workers_held" and event.stage in ("seed", "submodels", "finetune"):
            began = time.process_time()
        elif event.type == "workers_released" and event.stage in ("seed", "submodels", "finetune"):
            spent[event.stage] = spent.get(event.stage, 0.0) + time.process_time() - began

    directory = pipeline.run(config, (listen,), backend=LocalBackend(), ways=plan.alternatives)
    assert spent.keys() == {"seed", "submodels", "finetune"}
    total = sum(planned[stage].worker_seconds for stage in spent)
    assert total / 3 < sum(spent.values()) < total * 3
    check_one_bill(directory, config)
    check_stored(directory, plan)


def check_stored(directory, plan):
    """Models and optimizer states have the stored sizes that a plan names; next to them, other files are small.

    The other files are JSON and a tokenizer.
    """
    folders = {stage.name: stage.directory for stage in STAGES}
    for stage in plan.storage:
        if stage.stage in ("seed", "decompose", "submodels", "merge", "finetune", "export"):
            files = [
                path
                for path in (directory / folders[stage.stage]).rglob("*")
                if path.is_file() and path.suffix != ".json"
            ]
            found = sum({path.stat().st_ino: path.stat().st_size for path in files}.values())
            assert found == pytest.approx(stage.stored, rel=0.15), stage.stage


def check_one_bill(directory, config):
    """What a service folds from the events, what the report holds and what the card says are the same."""
    meter, events = Meter(), EventLog.read(directory / "events.jsonl")
    for event in events:
        meter.update(event)
    bill = metered_bill(meter, config)
    assert read_json(directory / "report.json")["bill"] == bill.model_dump(mode="json")
    assert bill.complete
    assert {line.stage for line in bill.lines} == {"seed", "submodels", "merge", "finetune", "evaluate", "export"}
    assert events[-1].data["bill"] == {key: getattr(bill, key) for key in BILL_FIGURES}
    assert bill.verdict in (directory / "model" / "README.md").read_text(encoding="utf-8")


SMALL_POOL = {"resource": "low", "gpu": 1, "memory_gb": 24, "price_per_hour": 0.35, "speed": 0.5, "max_workers": 8}


def with_gpus(low=None, **changes):
    raw = {
        "name": "gpus",
        "corpus": {"sources": [{"path": "embedded"}]},
        "tokens": {"total": 20_000_000},
        "pools": {
            "low_memory": SMALL_POOL | (low or {}),
            "high_memory": {"gpu": 1, "price_per_hour": 2.28, "workers": 1},
        },
    }
    for setting, value in changes.items():
        section, _, key = setting.partition("__")
        raw.setdefault(section, {})[key] = value
    return check_config(raw)


types = st.lists(st.tuples(st.floats(0.1, 5), st.floats(0.2, 2), st.integers(1, 3)), max_size=3).map(
    lambda found: [
        {
            "name": f"t{number}",
            "resource": f"r{number}",
            "memory_gb": 24,
            "price_per_hour": price,
            "speed": speed,
            "max_workers": most,
        }
        for number, (price, speed, most) in enumerate(found)
    ]
)


@settings(max_examples=30, deadline=None)
@given(types, st.integers(0, 1), st.sampled_from([None, 1_000_000]), st.booleans())
def test_a_planned_bill_is_the_sum_of_its_stages_on_every_pool(kinds, gpu, every, seed):
    config = with_gpus(
        {"types": kinds, "gpu": gpu},
        evaluation__every_tokens=every,
        evaluation__max_tokens=10_000,
        clusters__vectors="hidden_state" if seed else "mean_token",
        tokens__seed_share=0.2 if seed else 0.0,
    )
    plan = build_plan(config, HERE)
    assert plan.bill.dollars == pytest.approx(sum(each.dollars for each in plan.estimates))
    for each in plan.estimates:
        assert each.dollars == pytest.approx(sum(line.dollars for line in plan.bill.lines if line.stage == each.stage))
        assert each.worker_seconds == pytest.approx(
            sum(line.worker_seconds for line in plan.bill.lines if line.stage == each.stage)
        )


@pytest.mark.parametrize(
    ("stages", "changes"),
    [
        ({"evaluate"}, {"evaluation__sources": [{"path": __file__}]}),
        ({"evaluate", "export"}, {"export__keep_apart": "always"}),
        ({"seed", "finetune"}, {"evaluation__every_tokens": 1_000_000}),
        ({"merge"}, {"merge__calibration_tokens": 10_000_000}),
    ],
)
def test_a_plan_contains_what_a_setting_costs(stages, changes):
    before, after = by_stage(build_plan(with_gpus(), HERE)), by_stage(build_plan(with_gpus(**changes), HERE))
    assert {name for name in before if after[name].dollars > before[name].dollars} == stages
    assert {name for name in before if after[name] != before[name]} == stages


@pytest.mark.parametrize("slots", [2, 8])
def test_gpu_workers_wait_for_syncs(slots):
    raw = yaml.safe_load(preset_text("default")) | {"recipe": None}
    raw["pools"]["low_memory"]["max_workers"] = slots
    with_syncs, without = (
        build_plan(check_config(raw | {"submodels": raw["submodels"] | {"sync_every": every}})) for every in (8, None)
    )
    stage = next(stage for stage in with_syncs.stages if stage.stage == "submodels")
    assert stage.fits_known
    ours, theirs = (by_stage(plan)["submodels"] for plan in (with_syncs, without))
    assert ours.seconds - theirs.seconds == pytest.approx(stage.sync.wait_seconds)
    held = min(stage.units, slots) * stage.sync.wait_seconds
    assert ours.worker_seconds - theirs.worker_seconds == pytest.approx(held)
    assert stage.sync.wait_seconds > 0
    assert by_stage(with_syncs)["seed"] == by_stage(without)["seed"]  # one card


def test_a_plan_says_that_the_cost_of_task_files_is_not_in_it(tmp_path):
    (tmp_path / "tasks.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n', encoding="utf-8")
    plan = build_plan(with_gpus(evaluation__lm_eval=[str(tmp_path / "tasks.jsonl")]), HERE)
    assert (plan.bill.complete, plan.bill.saving, plan.bill.verdict) == (False, None, None)
    assert plan.assumptions.endswith("time and cost of evaluation.lm_eval are not known and not included")
    assert build_plan(with_gpus(), HERE).bill.complete


def test_the_planned_evaluation_also_finds_the_clusters_of_the_text():
    known, unknown = (
        by_stage(build_plan(with_gpus(clusters__vectors=vectors), HERE))["evaluate"].dollars
        for vectors in ("mean_token", "hidden_state")
    )
    assert unknown > known


def test_an_upcycled_seed_s_calibration_is_planned():
    sparse = with_gpus(tokens__seed_share=0.5, tokens__finetune_share=0.5)
    assert by_stage(build_plan(sparse, HERE))["merge"].worker_seconds > START_UP


def test_a_plan_says_what_idle_cards_of_whole_nodes_add_to_a_bill_by_the_card() -> None:
    """One of 8 cards at $2 an hour merges, evaluates and exports, while 7 wait.

    Before: nothing, and then also the start of the gang's controller, for which no card of any node is billed.
    """
    nodes = {"gpu": 1, "card": "H100", "price_per_hour": 2.0, "workers": 8, "gpus_per_node": 8}
    low = {"gpu": 1, "card": "L4", "price_per_hour": 0.0, "max_workers": 8}
    config = preset("demo", pools={"low_memory": low, "high_memory": nodes})
    plan = build_plan(config)
    alone = [each for each in plan.estimates if each.stage in ("merge", "evaluate", "export")]
    assert all(each.worker_seconds == pytest.approx(each.seconds) for each in alone)
    [gang] = [each for each in plan.estimates if each.stage == "finetune"]
    assert gang.unbilled_seconds == START_UP
    assert gang.worker_seconds == pytest.approx(8 * ((gang.seconds or 0.0) - START_UP))  # none of 8 is idle
    idle = 7 * sum(each.seconds or 0.0 for each in alone)
    assert estimate.idle_in_nodes(config, plan.estimates) == pytest.approx(2.0 * idle / 3600)
    assert f"where nodes are rented whole, their idle cards add {format_dollars(2.0 * idle / 3600)}" in plan.assumptions
    single = preset("demo", pools={"low_memory": low, "high_memory": nodes | {"workers": 1, "gpus_per_node": 1}})
    assert "rented whole" not in build_plan(single).assumptions
