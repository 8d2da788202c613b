import io
import json
import re

import pytest
from rich.console import Console
from run_example import STAGES, events, report, run_report

from moedisco_ray.cli.display import JsonLines, LiveView, PlainLines, listener_for, report_view
from moedisco_ray.cli.display.formatting import count, gigabytes
from moedisco_ray.cli.display.live import render
from moedisco_ray.cli.display.plan import plan_view
from moedisco_ray.cli.display.state import RunState
from moedisco_ray.core.config import load_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.bill import format_dollars
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.plan import build_plan
from moedisco_ray.plan.speed import Machine, Probe, Trial


def text_of(renderable, width=120):
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(renderable)
    return console.file.getvalue()


def feed(listener):
    for event in events():
        listener(event)
    listener.close()


def test_plain_lines():
    stream = io.StringIO()
    feed(PlainLines(stream, interval=0))
    assert [line[10:] for line in stream.getvalue().splitlines()] == [
        "run demo in runs/demo",
        "corpus: reused",
        "seed: started",
        "seed: step 50/100, loss 4.8522, 10.2k tokens/s",
        "seed: step 100/100, loss 2.9430, 10.2k tokens/s",
        "seed: finished in 12.2 s",
        "cluster: started",
        "cluster: 4.00k of 10.0k vectors",
        "4 clusters, 1.00M tokens: 10 %, 20 %, 30 %, 40 %",
        "cluster: finished in 3.0 s",
        "submodels: started",
        "submodel-0: step 10/100, loss 7.2387, 10.2k tokens/s",
        "submodel-1: step 50/100, loss 4.8522, 10.2k tokens/s",
        "submodel-1: restarted: its node went away",
        "warning: no GPU found",
        "finished in 1 min 15 s",
    ]


def test_a_sync_has_a_line_and_an_event_of_an_earlier_version_has_none():
    stream = io.StringIO()
    lines, state = PlainLines(stream), RunState()
    for line in (
        '{"type": "sync", "stage": "submodels", "data": {"sync": 2, "syncs": 5, "members": ["a", "b"], "late": ["c"]}}',
        '{"type": "round", "stage": "submodels", "data": {"round": 3, "rounds": 5}}',
    ):
        event = Event.from_line(line.encode())
        lines(event)
        state.update(event)
    assert [line[10:] for line in stream.getvalue().splitlines()] == ["submodels: sync 2/5 of 2 models, without c"]


def test_plain_lines_show_each_unit_at_most_once_per_interval():
    stream = io.StringIO()
    lines = PlainLines(stream, interval=10)
    for second in range(35):
        for unit in ("submodel-0", "submodel-1"):
            lines(Event("progress", "submodels", unit, {"step": second, "steps": 99, "loss": 1.0}, time=float(second)))
    shown = [line.split()[1:4] for line in stream.getvalue().splitlines()]
    assert shown == [
        [f"{unit}:", "step", f"{step}/99,"] for step in (0, 10, 20, 30) for unit in ("submodel-0", "submodel-1")
    ]


def test_json_lines_are_the_events():
    stream = io.StringIO()
    feed(JsonLines(stream))
    assert [Event.from_line(line.encode()) for line in stream.getvalue().splitlines()] == events()


@pytest.mark.parametrize("json_wanted", [True, False])
def test_the_view_suits_the_output(json_wanted):
    pipe, terminal = Console(file=io.StringIO()), Console(file=io.StringIO(), force_terminal=True)
    assert type(listener_for(pipe, json_wanted)) is (JsonLines if json_wanted else PlainLines)
    assert type(listener_for(terminal, json_wanted)) is (JsonLines if json_wanted else LiveView)


def state_after(count_of_events):
    state = RunState()
    for event in events()[:count_of_events]:
        state.update(event)
    return state


def test_the_live_view_shows_stages_bars_clusters_and_notices():
    text = text_of(render(state_after(15), now=1_700_000_014.0))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[:10] == [
        "demo runs/demo",
        "✓ corpus reused",
        "✓ seed 12.2 s loss 2.943",
        "✓ cluster 3.0 s",
        "○ decompose",
        "● submodels 4.0 s loss 6.045",
        "○ merge",
        "○ finetune",
        "○ evaluate",
        "○ export",
    ]
    units = [line for line in lines if line.startswith("submodel-")]
    assert [unit.split(" ", 2)[2] for unit in units] == [
        "10/100 loss 7.239 10.2k tokens/s 18.0 s left",
        "50/100 loss 4.852 10.2k tokens/s 10.0 s left",
    ]
    assert [line.split(" ", 3)[3] for line in lines if line.startswith("cluster ")] == [
        "100k tokens 10 % 10 documents",
        "200k tokens 20 % 20 documents",
        "300k tokens 30 % 30 documents",
        "400k tokens 40 % 40 documents",
    ]
    assert "! submodel-1 restarted: its node went away" in lines
    assert "! no GPU found" in lines


def test_a_running_stage_shows_what_it_counts_until_it_ends():
    lines = [text_of(render(state_after(events_so_far), now=1_700_000_008.0)) for events_so_far in (7, 8, 10)]
    assert ["4.00k of 10.0k vectors" in text for text in lines] == [False, True, False]


def run_with_plan(tmp_path, *happened):
    """The live view of a demo run at second 100, with the plan of a machine whose speed is known."""
    path = tmp_path / "run.yaml"
    path.write_text(preset_text("demo"))
    config = load_config(path)
    trials = tuple(Trial(experts=experts, flops_per_token=1e7, flops_per_second=1e10) for experts in (1, 4))
    probe = Probe(cores=4, versions={}, trials=trials, start_up_seconds=2.0, text_bytes_per_second=1e6)
    machine = Machine(probe=probe, text_bytes=10**6)
    state = RunState(config, build_plan(config, machine))
    for event in (Event("run_started", data={"name": "demo", "stages": STAGES}, time=0.0), *happened):
        state.update(event)
    return state, {stage.stage: stage.seconds for stage in state.plan.estimates}


def test_the_time_left_is_the_plans_for_the_stages_to_come(tmp_path):
    state, planned = run_with_plan(tmp_path)
    assert state.seconds_left(0.0) == pytest.approx(sum(planned.values()))
    rest = sum(planned.values()) - planned["corpus"]
    state.update(Event("stage_started", "corpus", time=0.0))
    assert state.seconds_left(0.5) == pytest.approx(rest + planned["corpus"] - 0.5)
    assert state.seconds_left(1e6) == pytest.approx(rest)
    state.update(Event("stage_progress", "corpus", data={"done": 1, "total": 4, "unit": "documents"}, time=30.0))
    assert state.seconds_left(30.0) == pytest.approx(rest + 90.0)
    state.update(Event("run_failed", time=31.0))
    assert state.seconds_left(31.0) is None


def test_the_trainers_speed_overrules_the_plan_and_waiting_units_follow_in_waves(tmp_path):
    state, planned = run_with_plan(tmp_path, Event("stage_started", "submodels", time=0.0))
    rest = sum(planned.values()) - planned["submodels"]
    for unit in ("submodel-0", "submodel-1"):  # of the demo's four
        state.update(
            Event("progress", "submodels", unit, {"step": 25, "steps": 100, "tokens": 2500, "tokens_per_second": 100.0})
        )
    assert state.seconds_left(10.0) == pytest.approx(rest + 75.0 + 100.0)


def test_no_time_is_left_while_ray_starts(tmp_path):
    """Before (af276e38): after a minute without a stage, the view said "about 10 min 17 s left" and nothing of Ray."""
    state, _ = run_with_plan(tmp_path, Event("ray_starting", time=1.0))
    assert "starts Ray" in text_of(render(state, 60.0))
    assert "left" not in text_of(render(state, 60.0))
    state.update(Event("warning", data={"message": "again"}))
    assert state.starting
    state.update(Event("stage_started", "corpus", time=61.0))
    assert "left" in text_of(render(state, 61.0))


def test_the_live_view_shows_dollars_so_far(tmp_path):
    held = Event("workers_held", "seed", data={"hold": "h", "pool": "high_memory", "workers": 2}, time=0.0)
    state, _ = run_with_plan(tmp_path, held, Event("heartbeat", time=1800.0))
    price = state.config.pools.high_memory.price_per_hour
    assert f"left, {format_dollars(price)} so far" in text_of(render(state, 0.0))
    assert "so far" not in text_of(render(RunState(), 0.0))


def test_plain_lines_show_a_stages_count_at_most_once_per_interval():
    stream = io.StringIO()
    lines = PlainLines(stream, interval=10)
    lines(Event("stage_started", "merge", time=0.0))
    for second in range(25):
        lines(
            Event(
                "stage_progress",
                "merge",
                data={"done": second, "total": 99, "unit": "tensors merged"},
                time=float(second),
            )
        )
    assert [line.split(maxsplit=1)[1].strip() for line in stream.getvalue().splitlines()] == [
        "merge: started",
        "merge: 10 of 99 tensors merged",
        "merge: 20 of 99 tensors merged",
    ]


def test_a_restart_before_the_first_step_moves_no_bar():
    state = state_after(13)
    state.update(
        Event("worker_restarted", "submodels", "submodel-1", {"kind": "failed", "step": None, "reason": "its image"})
    )
    assert state.units["submodel-1"].step == 50
    assert "50/100" in text_of(render(state, now=1_700_000_013.0))


def test_cluster_bars_are_as_long_as_their_tokens():
    text = text_of(render(state_after(9), now=0.0))
    bars = [line.count("━") for line in text.splitlines() if line.startswith("cluster ")]
    assert bars[3] == 30
    assert bars == pytest.approx([7, 15, 22, 30], abs=1)


def test_the_live_view_marks_a_stage_that_failed():
    text = text_of(render(state_after(16), now=1_700_000_100.0))
    assert ["✗", "submodels", "5.0", "s"] in [line.split()[:4] for line in text.splitlines()]


def test_many_units_are_cut_short():
    state = RunState()
    state.update(Event("stage_started", "submodels"))
    for k in range(40):
        state.update(Event("progress", "submodels", f"submodel-{k}", {"step": 1, "steps": 2, "tokens": 1, "loss": 1.0}))
    assert "and 28 more" in text_of(render(state, now=0.0))


def test_the_live_view_restores_the_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    feed(LiveView(console))
    text = console.file.getvalue()
    assert "submodel-1" in text
    assert text.rstrip("\n").endswith("\x1b[?25h")  # the cursor is back
    LiveView(console).close()  # before any event


def test_show_has_the_table_the_clusters_the_measurements_and_the_samples():
    text = text_of(report_view(run_report()))
    for part in (
        "joint training on 1 x A100 (estimate)",
        "On these machines this run costs least",
        "license, import, return",
        "bits per byte",
        "licences",
        "41.25",
        "The license of the [bold]software[/bold] is",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_show_leaves_out_what_was_not_measured():
    bare = report() | {"clusters": {}, "evaluation": {}, "samples": []}
    bare["bill"] |= {"saving": None, "verdict": None, "baseline": None}
    text = text_of(report_view(RunReport.model_validate(bare)))
    assert "total" in text
    for part in ("Clusters", "Validation", "cheaper", "joint training"):
        assert part not in text


@pytest.mark.parametrize(("state", "verdict"), [("pure_bf16", "fits"), ("bf16", "submodels fits 24 GiB with")])
def test_a_plan_shows_what_fits_and_with_which_settings(tmp_path, state, verdict):
    path = tmp_path / "run.yaml"
    path.write_text(preset_text("paper"))
    text = text_of(plan_view(build_plan(load_config(path, [f"submodels.optimizer.precision={state}"]))))
    assert verdict in text
    assert ("the run uses" in " ".join(text.split())) == (state == "bf16")
    assert "2.06B" in text
    assert "On these machines" in text


@pytest.mark.parametrize("width", [80, 90, 100, 120])
def test_a_narrow_terminal_takes_no_digit(tmp_path, width):
    path = tmp_path / "run.yaml"
    path.write_text(preset_text("default").replace("recipe: auto", "recipe: null"))
    plan = build_plan(load_config(path))
    text = text_of(plan_view(plan), width)
    assert "…" not in text
    for stage in plan.stages:
        assert all(word in text.split() for word in (count(stage.cost.tokens), gigabytes(stage.memory.total)))
    assert format_dollars(plan.bill.dollars) in text.split()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (10_240, "10.2k"),
        (999_960, "1.00M"),
        (123_456_789, "123M"),
        (1.5e9, "1.50B"),
    ],
)
def test_counts(number, text):
    assert count(number) == text


def test_gigabytes_are_of_two_to_the_thirty():
    assert [gigabytes(size * 2**30) for size in (0.5, 24)] == ["0.50", "24.0"]


def test_every_event_type_is_json():
    assert all(json.loads(event.to_json())["type"] == event.type for event in events())


def test_a_plan_on_a_mixed_pool_shows_the_node_types_of_sub_models(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(preset_text("default").replace("recipe: auto", "recipe: null"))
    types = [
        {
            "name": name,
            "resource": f"{name}_gpu",
            "memory_gb": size,
            "price_per_hour": price,
            "speed": 1,
            "max_workers": 5,
        }
        for name, size, price in (("tiny", 1, 0.01), ("l4", 24, 0.33), ("a10", 24, 0.42))
    ]
    text = text_of(
        plan_view(build_plan(load_config(path, ["clusters.count=8", f"pools.low_memory.types={json.dumps(types)}"])))
    )
    lines = [line.split() for line in text.splitlines() if "submodels" in line and "_gpu" in line]
    assert [(line[0], line[2], line[4:-2]) for line in lines] == [
        ("tiny", "tiny_gpu", ["too", "small", "0"]),
        ("l4", "l4_gpu", ["fits", "5"]),
        ("a10", "a10_gpu", ["fits", "3"]),
    ]


def test_a_plan_prices_the_fine_tune_on_both_pools(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(preset_text("default").replace("recipe: auto", "recipe: null"))

    def line(*overrides):
        text = " ".join(text_of(plan_view(build_plan(load_config(path, overrides)))).split())
        return re.search(r"finetune\.pool=.*?(not fit \d+ GiB|On these)", text)[0]

    assert re.fullmatch(
        r"finetune\.pool=low_memory, 8 workers: the fine-tune would cost \$\S+ in .+, instead of \$\S+ in .+ On these",
        line(),
    )
    assert line("finetune.pool=low_memory").startswith("finetune.pool=high_memory, 1 worker: the fine-tune would cost ")
    assert line("pools.low_memory.memory_gb=1", "clusters.count=4").endswith("the fine-tune would not fit 1 GiB")


@pytest.mark.parametrize(("contribution", "says"), [("checkpoint", "its checkpoint of step 40"), ("seed", "its seed")])
def test_both_views_name_a_unit_that_the_merge_does_not_wait_for(contribution, says):
    event = Event(
        "unit_let_go",
        "submodels",
        "submodel-1",
        {"contribution": contribution, "steps": 40, "tokens": 400, "reason": "its time was up"},
    )
    stream = io.StringIO()
    PlainLines(stream)(event)
    said = f"submodel-1: not waited for, the merge takes {says}: its time was up"
    assert stream.getvalue()[10:] == said + "\n"
    state = RunState()
    state.update(Event("progress", "submodels", "submodel-1", {"step": 45, "steps": 100, "loss": 1.0}))
    state.update(event)
    assert state.notices == [said]
    assert (state.units["submodel-1"].step, state.units["submodel-1"].steps) == (45, 100)
