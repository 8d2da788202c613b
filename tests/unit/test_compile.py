"""Training with compiled layers against the same training without."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gang_processes import gang
from tiny_training import RECIPE, L, run, stop_after, variant, weights, write_shard, write_tiny
from training_worker import Counting

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.models import check_same, load_model
from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training import TrainJob, World, compile_probe, stepper
from moedisco_ray.training.compile_probe import Trial
from moedisco_ray.training.compiled import Switch, compile_layers

pytestmark = [
    pytest.mark.timeout(900),  # a compiler runs
    pytest.mark.filterwarnings("ignore"),  # torch's compiler uses deprecated functions
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
COMPILED = RECIPE.model_copy(update={"compile": True})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compile")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "moe", 4, family="qwen2_moe")
    write_tiny(home / "recurrent", 4, family="qwen3_next")
    write_tiny(home / "dense", 1)
    return home


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="plain",
        model=home / "dense",
        packed_dirs=(home / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=6,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=3,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
    )


def close(found: TrainJob, expected: TrainJob) -> None:
    torch.testing.assert_close(weights(found.output), weights(expected.output), rtol=1e-3, atol=5e-5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("model", ["moe", "recurrent"])
def test_compiled_layers_train_alike_and_resume_bit_for_bit(job: TrainJob, model: str) -> None:
    """Graphs around experts, and around layers with a state, are tested too, as is an evaluation between steps."""
    job = dataclasses.replace(job, model=job.model.with_name(model))
    compiled = variant(job, "compiled", optimizer=COMPILED, held_out=Counting(every=2))
    found, expected = run(compiled), run(job)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    close(compiled, job)

    parts = dataclasses.replace(variant(compiled, "parts"), held_out=None)
    assert run(parts, stop=stop_after(3)).steps == 3
    torch.compiler.reset()  # as in another process
    resumed = run(parts)
    assert resumed.restored_step == 3
    assert resumed.losses == found.losses
    check_same(weights(parts.output), weights(compiled.output))


@pytest.mark.parametrize(("model", "graphs"), [("dense", 1), pytest.param("moe", 2, marks=pytest.mark.slow)])
def test_layers_of_one_kind_share_graphs(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, model: str, graphs: int
) -> None:
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        del inputs
        compiled.append(len(graph.graph.nodes))
        return graph

    usual = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: usual(function, **settings, backend=count))
    job = dataclasses.replace(job, model=job.model.with_name(model))
    torch.compiler.reset()
    found = run(variant(job, "compiled", optimizer=COMPILED, held_out=Counting(every=2)))
    assert found.losses == run(job).losses
    assert len(compiled) == graphs  # of two layers; around a layer's experts there are two


Backend = Callable[[torch.fx.GraphModule, object], Callable[..., Any]]


def same(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    del inputs
    return graph


def doubled(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    del inputs
    return lambda *given: [2 * each if each.is_floating_point() else each for each in graph(*given)]


def broken(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
    raise RuntimeError("the compiler has a bug")


@pytest.mark.parametrize(("backend", "is_on"), [(same, True), (doubled, False), (broken, False)])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_probe_compiles_what_computes_the_same_and_leaves_no_trace(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, model: str, backend: Backend, is_on: bool
) -> None:
    switches, usual = list[Switch](), torch.compile

    def compiled(*given: Any) -> Switch:
        switches.append(compile_layers(*given))
        return switches[-1]

    monkeypatch.setattr(torch, "compile", lambda function, **settings: usual(function, **settings, backend=backend))
    monkeypatch.setattr(stepper, "compile_layers", compiled)
    monkeypatch.setattr(compile_probe, "may_compile", lambda job, _: job.name == "tried")
    monkeypatch.setattr(compile_probe, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(compile_probe, "_FASTER", math.inf)
    job = dataclasses.replace(job, model=job.model.with_name(model))
    tried = dataclasses.replace(variant(job, "tried"), name="tried")
    torch.compiler.reset()
    found, expected = run(tried), run(job)
    assert [switch.on for switch in switches] == [is_on]
    assert found.losses == expected.losses
    check_same(weights(tried.output), weights(job.output))


PLAIN = Trial(loss=2.0, norm=1.0, seconds=1.0)


@pytest.mark.parametrize(
    ("compiled", "passes", "is_on"),
    [
        (Trial(2.001, 1.01, 0.8), 1800, True),
        (Trial(2.001, 1.01, 0.8), 1799, False),
        (Trial(2.001, 1.01, 1.0), 10_000, False),
        (Trial(2.1, 1.0, 0.5), 10_000, False),
        (Trial(2.0, 1.2, 0.5), 10_000, False),
        (Trial(math.nan, 1.0, 0.5), 10_000, False),
    ],
)
def test_only_a_long_training_that_is_faster_and_the_same_is_compiled(
    compiled: Trial, passes: int, is_on: bool
) -> None:
    switches = list[Switch]()

    def compiling() -> Switch:
        switches.append(Switch())
        return switches[-1]

    compile_probe.probe(compiling, lambda: compiled if switches else PLAIN, passes, "name")
    assert [switch.on for switch in switches if switch.on] == [True] * is_on


@pytest.mark.parametrize(
    ("changes", "world", "may"),
    [
        ({}, World(device="cuda:0"), True),
        ({}, World(), False),
        ({}, World(size=2, device="cuda:0"), False),
        ({"compile": False}, World(device="cuda:0"), False),
        ({"gradient_checkpointing": True}, World(device="cuda:0"), False),
    ],
)
def test_the_compiler_is_tried_on_one_gpu(job: TrainJob, changes: dict[str, bool], world: World, may: bool) -> None:
    job = dataclasses.replace(job, optimizer=RECIPE.model_copy(update=changes))
    assert compile_probe.may_compile(job, world) is may
    assert not compile_probe.may_compile(dataclasses.replace(job, deterministic=True), world)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(None, marks=pytest.mark.chaos), Layout(expert=2)])
def test_sharded_layers_compile_too(job: TrainJob, tmp_path: Path, layout: Layout | None) -> None:
    job = dataclasses.replace(job, model=job.model.with_name("moe" if layout else "dense"))
    compiled = dataclasses.replace(variant(job, "compiled", optimizer=COMPILED), name="compiled")
    [first, _] = gang(2, tmp_path, [(compiled, None)], timeout=600, layout=layout)
    assert first["compiled"].losses == pytest.approx(run(job).losses, rel=1e-5)
    close(compiled, job)


def test_a_machine_without_a_compiler_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"optimizer.compile: True: needs g\+\+ on every machine"):
        compile_layers(load_model(home / "dense"), "cpu")
