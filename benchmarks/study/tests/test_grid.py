"""The grid: cells, order and resumption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_example import MADE, TUNED, cell, piece, write_corpora

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid import cells, command, files, pieces, run, summary
from benchmarks.study.grid.records import Entry, PieceResult, TunedArm
from moedisco_ray.core.errors import ConfigError, NotFiniteError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline

FIELDS = (
    "corpus",
    "family",
    "start",
    "experts",
    "top_k",
    "active_share",
    "budget_tokens",
    "arm",
    "seeds",
    "loss_gap",
    "loss_gap_spread",
    "dollars_to_joint_loss",
    "hours_ratio",
)
"""Keys of an entry of summary.json."""


class Killed(Exception):  # noqa: N818 - what happens to the process, not an error of ours
    pass


def smoke_axes(**changes: Any) -> pieces.Axes:
    return dataclasses.replace(
        pieces.Axes(
            corpora=("report",),
            families=("qwen3_moe",),
            starts=("random",),
            shapes=((16, 2),),
            budgets=(1,),
            seeds=(0,),
            arms=(REFERENCE, "disco"),
            scale="smoke",
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """Folder of a measured grid of one cell."""
    folder, threads = tmp_path_factory.mktemp("grid"), torch.get_num_threads()
    # sets the threads to 1
    assert run.run_pieces(pieces.reporting(smoke_axes()), places(folder, corpora), "grid") == []
    torch.set_num_threads(threads)
    return folder


def places(folder: Path, corpora: Path) -> run.Places:
    return run.Places(corpora, folder / "work", folder / "results", folder / "published")


def losses(folder: Path) -> dict[str, float]:
    return {
        str(path.name): PieceResult.model_validate(read_json(path)).loss
        for path in (folder / "results").glob("report-*")
    }


def test_no_cell_is_reported_where_arms_are_tuned() -> None:
    axes = pieces.Axes(corpora=("embedded", "other"))
    found = pieces.with_tuning(pieces.reporting(axes))
    tuned = [each for each in found if each.kind == "tune"]
    reported = [each for each in found if each.kind == "report"]
    assert {each.cell.corpus for each in tuned} == {cells.TUNING_CORPUS}
    assert {each.seed for each in tuned} == {cells.TUNING_SEED}
    assert not {each.cell.corpus for each in reported} & {each.cell.corpus for each in tuned}
    assert not {each.seed for each in reported} & {each.seed for each in tuned}
    assert len(found) == len(set(found)) == len(set(map(str, found)))
    place = {each: number for number, each in enumerate(found)}
    for each in reported:  # every arm has its own sweep, in the same cell as joint training's
        assert place[pieces.Piece("tune", each.cell.recipe, each.arm, cells.TUNING_SEED)] < place[each]


def test_the_tuning_corpus_is_on_no_axis(corpora: Path) -> None:
    assert cells.report_corpora(corpora) == ("embedded", "report")
    with pytest.raises(ConfigError, match=r"--corpora: 'small8': is not on this axis; there are embedded, report"):
        command._chosen("--corpora", cells.TUNING_CORPUS, dict.fromkeys(cells.report_corpora(corpora)))


def test_a_part_of_the_grid_is_useful() -> None:
    ordered = pieces.reporting(pieces.Axes(corpora=("embedded", "other")))
    first = ordered[0]
    assert (first.arm, first.cell.active_share, first.cell.budget, first.seed) == (REFERENCE, 0.125, 1, 0)
    assert ordered[1] == dataclasses.replace(first, arm="disco")
    measured: set[tuple[str, int]] = set()
    for each in ordered:  # joint training comes before the arms that are compared with it
        assert each.arm == REFERENCE or (str(each.cell), each.seed) in measured
        measured |= {(str(each.cell), each.seed)} if each.arm == REFERENCE else set()
    smallest = [each for each in ordered if each.cell.budget == 1 and each.cell.active_share == 0.125]
    assert ordered[: len(smallest)] == smallest
    assert {each.cell.budget for each in ordered[len(smallest) : 2 * len(smallest)]} >= {4}


@pytest.mark.parametrize(("experts", "top_k"), [cells.GPU_SHAPE, *cells.SHAPES])
def test_sub_models_have_a_router_to_train(experts: int, top_k: int) -> None:
    assert experts // cell(experts=experts, top_k=top_k).groups >= top_k


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_killed_grid_continues_with_the_same_results(
    tmp_path: Path, corpora: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, killed = pieces.reporting(smoke_axes()), places(tmp_path / "killed", corpora)
    real = pipeline.run

    def kill(event: Event) -> None:
        if event.type == "stage_started" and event.stage == "finetune":
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(
            run.pipeline,
            "run",
            lambda config, *, backend: real(
                config, (kill,) if config.name.startswith("disco") else (), backend=backend
            ),
        )
        with pytest.raises(Killed):
            run.run_pieces(work, killed, "grid")
    assert len(losses(tmp_path / "killed")) == 1  # joint training was done, and is not measured again
    before = (work[0].path(killed.results)).stat().st_mtime_ns
    assert run.run_pieces(work, killed, "grid") == []
    assert (work[0].path(killed.results)).stat().st_mtime_ns == before
    assert losses(tmp_path / "killed") == losses(undisturbed)
    # Models are removed; the corpus stays for further arms.
    kept = [path.name for path in (killed.work / f"{work[0].cell}-0").iterdir()]
    assert kept == ["shared"]

    files.publish(killed.results, killed.published)
    written = read_json(killed.published / files.SUMMARY)
    assert {tuple(each) for each in written} == {FIELDS}
    entries = [Entry.model_validate(each) for each in written]
    assert {entry.arm for entry in entries} == {REFERENCE, "disco", summary.JOINT_LOW}
    published = {path.name: path.read_bytes() for path in killed.published.iterdir()}
    files.publish(tmp_path / "nothing", killed.published)
    assert {path.name: path.read_bytes() for path in killed.published.iterdir()} == published


def test_no_piece_starts_after_the_hours(tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, started = iter(range(1000)), []
    monkeypatch.setattr(run.time, "monotonic", lambda: 1800.0 * next(clock))
    monkeypatch.setattr(run, "measure", lambda piece, *_: started.append(piece))
    work = pieces.reporting(smoke_axes(arms=pieces.ARMS))
    left = run.run_pieces(work, places(tmp_path, corpora), "grid", hours=2)
    assert started
    assert [*started, *left] == work


def test_an_arm_that_diverges_does_not_end_the_grid(
    tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(piece: pieces.Piece, *_: Any) -> None:
        if piece.arm == "disco":
            raise NotFiniteError("finetune: the loss of step 3 is nan", 3)

    monkeypatch.setattr(run, "measure", measure)
    work = pieces.reporting(smoke_axes(arms=pieces.ARMS))
    assert [each.arm for each in run.run_pieces(work, places(tmp_path, corpora), "grid")] == ["disco"]


def test_every_arm_is_tuned_by_the_same_sweep(tmp_path: Path, corpora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: dict[str, list[str]] = {}

    def trained(config: Any) -> None:
        (config.directory / "evaluation").mkdir(parents=True)

    def loss(directory: Path, measured: str) -> Any:
        arm, _, setting = directory.name.removesuffix("-tokens").partition("-batch-")
        swept.setdefault(arm, []).append(setting)
        return type("Figures", (), {"loss": 4.0})

    monkeypatch.setattr(run, "_run", trained)
    monkeypatch.setattr(run, "evaluated", loss)
    there = places(tmp_path, corpora)
    sweeps = [
        each for each in pieces.with_tuning(pieces.reporting(smoke_axes(arms=pieces.ARMS))) if each.kind == "tune"
    ]
    assert run.run_pieces(sweeps, there, "grid") == []
    assert swept.keys() == set(pieces.ARMS)
    for tried in swept.values():  # joint training and all others: the same number of trainings, rates and schedules
        assert len(tried) == len(set(tried)) == len(swept[REFERENCE])
        assert len({text.rpartition("-")[2] for text in tried}) == 2
        assert len({text.partition("-rate-")[2].rpartition("-")[0] for text in tried}) == 3
    report = pieces.Piece("report", sweeps[0].cell.model_copy(update={"corpus": "report", "budget": 4}), REFERENCE, 0)
    found = run.tuned_arm(report, there)
    assert found is not None
    assert found.values.keys() == {
        "submodels.optimizer.batch_tokens",
        "submodels.optimizer.lr",
        "finetune.optimizer.batch_tokens",
        "finetune.optimizer.lr",
        "finetune.optimizer.schedule",
    }


@pytest.mark.parametrize(
    ("rate", "share", "done", "is_tuned"),
    [(4e-3, 1.0, True, True), (8e-3, 1.0, False, False), (8e-3, 0.5, True, False)],
)  # the sweep is of another recipe
def test_a_result_without_the_values_of_the_sweep_is_measured_again(
    tmp_path: Path, corpora: Path, rate: float, share: float, done: bool, is_tuned: bool
) -> None:
    there = places(tmp_path, corpora)
    report = pieces.reporting(smoke_axes())[0]
    before = piece(REFERENCE, 4.0).model_copy(
        update={"recipe": {"finetune.optimizer.lr": 4e-3, "tokens.finetune_share": 1.0}}
    )
    files.write(report.path(there.results), before)
    assert run.is_done(report, there)
    values = {"finetune.optimizer.lr": rate, "submodels.optimizer.lr": rate}  # joint training has no sub-models
    sweep = TunedArm(
        cell=report.cell.recipe,
        seed=7,
        arm=REFERENCE,
        values=values,
        recipe={"tokens.finetune_share": share},
        settings=TUNED,
        made=MADE,
    )
    files.write(there.results / "tune-1.json", sweep)
    assert run.is_done(report, there) == done
    files.publish(there.results, tmp_path / "published")
    (published,) = files.published(tmp_path / "published")
    assert published == before.model_copy(update={"tuned": TUNED if is_tuned else None})
