"""The grid: cells, order, resumption, summary and tables."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from grid_example import JOINT, MADE, OURS, cell, piece, write_corpora
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import document
from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.compare.records import TunedSettings
from benchmarks.study.compare.run import compare
from benchmarks.study.grid import cells, command, files, picture, pieces, prices, run, section, summary
from benchmarks.study.grid.records import Entry, Figures, PieceResult, TunedArm
from moedisco_ray.cli.figures import STYLE
from moedisco_ray.core.errors import ConfigError, NotFiniteError
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

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
TUNED = TunedSettings(batch_tokens=256, lr=1e-3, schedule="wsd", trainings=4, slice_tokens=1280)

RIVALS = ("Expert Upcycling, grown at 95 % of the tokens", "sparse upcycling at 95 %")


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


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_compare_agrees_with_the_grid_on_a_cell(tmp_path: Path, corpora: Path, undisturbed: Path) -> None:
    base = cells.base_config(cell(), 0, corpora, tmp_path)
    compared = compare(base, tmp_path, ["disco"], budgets=("tokens",), backend=LocalBackend())
    rows = {row.arm: row for row in compared.rows if row.budget == "tokens"}
    measured = files.read_pieces(undisturbed / "results")
    assert {each.arm: each.loss for each in measured} == {arm: rows[arm].loss for arm in (REFERENCE, "disco")}
    entry = by_arm(measured)["disco", 1]
    assert entry.loss_gap == rows["disco"].loss - rows[REFERENCE].loss
    assert entry.dollars_equal_tokens.paper == pytest.approx(rows["disco"].dollars / rows[REFERENCE].dollars, rel=1e-3)


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


def by_arm(results: list[PieceResult]) -> dict[tuple[str, int], Figures]:
    return {(entry.arm, entry.budget_tokens // cells.SMOKE.tokens): entry for entry in summary.summarise(results)}


def test_the_summary_of_results_made_by_hand() -> None:
    results = [
        piece(REFERENCE, 4.0),
        piece(REFERENCE, 4.2, seed=1),
        piece("disco", 4.1, phases=OURS),
        piece("disco", 4.5, seed=1, phases=OURS),
        piece("upcycle", 4.3, seed=2),
    ]  # joint training lacks seed 2
    found = by_arm(results)
    assert found.keys() == {(REFERENCE, 1), (summary.JOINT_LOW, 1), ("disco", 1)}
    ours, cheap = found["disco", 1], found[summary.JOINT_LOW, 1]
    assert ours.seeds == (0, 1)
    assert ours.loss_gap == pytest.approx(0.2)
    assert (ours.loss_gap_spread.min, ours.loss_gap_spread.max) == (pytest.approx(0.1), pytest.approx(0.3))
    ratio = 0.35 / 0.72 / 2.28
    assert ours.dollars_equal_tokens.paper == pytest.approx(0.9 * ratio + 0.1)
    assert ours.hours_ratio == pytest.approx(0.9 / 0.72 / 4 + 0.1)
    assert cheap.dollars_equal_tokens.paper == pytest.approx(ratio)
    assert cheap.hours_ratio == pytest.approx(1 / 0.72 / 2)  # a card for each sub-model of ours
    assert (cheap.loss_gap, found[REFERENCE, 1].dollars_equal_tokens.aws) == (0, 1)
    # one budget, no slope
    assert ours.dollars_to_joint_loss.model_dump() == {"paper": None, "marketplace": None, "aws": None}


@given(st.floats(0.05, 1.0), st.floats(-0.3, 0.5))
def test_dollars_to_the_loss_follow_the_slope_of_joint_training_within_a_budgets_step(slope: float, gap: float) -> None:
    results = [piece(REFERENCE, 5.0 - slope * math.log(budget), budget=budget) for budget in (1, 4, 16)]
    results += [piece("disco", 5.0 - slope * math.log(4) + gap, budget=4, phases=OURS)]
    ours = by_arm(results)["disco", 4]
    same, dollars = ours.dollars_equal_tokens.paper, ours.dollars_to_joint_loss.paper
    assert same is not None
    if abs(gap) > slope * math.log(4) + 1e-9:
        assert dollars is None
    elif abs(gap) < slope * math.log(4) - 1e-9:
        assert dollars == pytest.approx(same * math.exp(gap / slope))
        # Joint training on exp(gap / slope) times as many tokens would lose what the gap is.
        assert slope * math.log(dollars / same) == pytest.approx(gap, abs=1e-9)
    assert (
        by_arm([*results, piece(REFERENCE, 9.0, budget=16)])["disco", 4].dollars_to_joint_loss
        == ours.dollars_to_joint_loss
    )


def test_no_dollars_where_more_tokens_do_not_help() -> None:
    results = [piece(REFERENCE, 4.0), piece(REFERENCE, 4.1, budget=4), piece("disco", 4.2, budget=4, phases=OURS)]
    assert by_arm(results)["disco", 4].dollars_to_joint_loss.paper is None


def test_price_books_are_the_papers_and_the_cluster_files() -> None:
    books = prices.books()
    assert books["paper"].cheap.flop_price / books["paper"].large.flop_price == pytest.approx(0.35 / 0.72 / 2.28)
    assert books["marketplace"].cheap.price_per_hour == 0.35
    assert books["marketplace"].cheap.speed == pytest.approx(165 / 312)
    assert (books["aws"].cheap.gpu, books["aws"].large.gpu) == ("L4", "H100")
    assert books["aws"].cheap.flop_price / books["aws"].large.flop_price == pytest.approx(0.8, abs=0.05)
    assert prices.dollars(JOINT, JOINT).model_dump() == {"paper": 1, "marketplace": 1, "aws": 1}


def test_slopes_compare_the_seeds_that_two_budgets_share() -> None:
    results = [piece(REFERENCE, 4.0), piece(REFERENCE, 8.0, seed=1), piece(REFERENCE, 3.5, budget=4)]
    results += [
        piece("disco", 4.2, phases=OURS),
        piece("disco", 9.0, seed=1, phases=OURS),
        piece("disco", 3.8, budget=4, phases=OURS),
    ]
    assert summary.loss_slope(cell(budget=4), results) == pytest.approx(0.5 / math.log(4))
    found = by_arm(results)
    assert section.slope_of_gap(found.values(), found["disco", 4]) == "+0.100"
    apart = by_arm([*results[1:3], *results[4:]])
    assert section.slope_of_gap(apart.values(), apart["disco", 4]) == "-"
    assert apart["disco", 4].dollars_to_joint_loss.paper is None


def test_a_table_has_a_row_for_each_arm_at_the_largest_budget_and_the_slope_of_the_gap() -> None:
    results = []
    for budget, gap in ((1, 0.1), (4, 0.12), (16, 0.16)):
        results.append(piece(REFERENCE, 5.0 - 0.3 * math.log(budget), budget=budget))
        results += [piece(arm, results[-1].loss + gap, budget=budget, phases=OURS) for arm in pieces.ARMS[1:]]
    found = section.tables(summary.summarise(results))
    assert [title.partition(" tokens")[0].rpartition(" ")[2] for title in found] == [
        f"{budget * cells.SMOKE.tokens:,}" for budget in (16, 4, 1)
    ]
    (title, rows), *_ = found.items()
    assert f"{16 * cells.SMOKE.tokens:,} tokens, seed 0, at the starting values, not tuned" in title
    half = "half of the experts, joint on the cheap pool"
    assert [row[0] for row in rows] == ["ours", *RIVALS, half, "joint on the cheap pool"]
    assert {len(row) for row in rows} == {len(section.HEAD)}
    assert rows[0][1:3] == ["+0.160", "+0.030"]
    assert rows[-1][1:3] == ["+0.000", "+0.000"]


def test_a_table_says_bits_per_byte_and_what_other_text_costs() -> None:
    measured = [
        (REFERENCE, 0, 50.0),
        (REFERENCE, 1, 40.0),
        ("disco", 0, 55.0),
        ("disco", 1, 36.0),
        ("upcycle", 0, None),
    ]
    results = [
        piece(arm, 4.0, seed=seed).model_copy(update={"bits_per_byte": 1.25 + seed / 2, "unseen_perplexity": unseen})
        for arm, seed, unseen in measured
    ]
    ((title, rows),) = section.tables(summary.summarise(results)).items()
    assert title.endswith("joint training's loss 4.000 (1.500 bits per byte)")
    assert [row[-1] for row in rows] == ["1.000", "-", "1.000"]


def test_a_row_says_what_it_lacks_of_its_tables_title() -> None:
    measured = ((REFERENCE, 0), (REFERENCE, 1), ("disco", 0), ("disco", 1), ("upcycle", 1))
    results = [piece(arm, 4.0, seed=seed) for arm, seed in measured]
    tuned = [each.model_copy(update={"tuned": None if each.arm == "upcycle" else TUNED}) for each in results]
    ((title, rows),) = section.tables(summary.summarise(tuned)).items()
    assert "seeds 0, 1, tuned" in title
    assert [row[0] for row in rows] == ["ours", f"{RIVALS[1]}, seed 1, not tuned", "joint on the cheap pool"]
    ((title, rows),) = section.tables(summary.summarise(results)).items()
    assert "seeds 0, 1, at the starting values, not tuned" in title
    assert rows[1][0] == f"{RIVALS[1]}, seed 1"


def test_a_line_of_the_picture_has_a_point_per_budget_at_its_dollars() -> None:
    results = [
        piece(arm, 4.0 / budget, budget=budget, phases=phases)
        for budget in (1, 4)
        for arm, phases in ((REFERENCE, JOINT), ("disco", OURS))
    ]
    with mpl.rc_context(STYLE):
        [axes] = picture.draw(summary.summarise(results)).axes
    lines = {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["whole model on an A100"] == ([1.0, 4.0], [4.0, 1.0])
    assert lines["parts on RTX 4090s, then an A100"][0] == pytest.approx([0.29, 1.16], abs=0.02)
    assert lines["grown on RTX 4090s, then an A100"] == ([], [])


def test_the_table_of_results_has_four_rows_at_the_largest_budget_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(section, "PUBLISHED", tmp_path / "published")

    def publish(results: list[PieceResult]) -> tuple[str, list[list[str]]]:
        for each in results:
            name = f"report-{each.cell}-{each.arm}-{each.seed}.json"
            files.write(tmp_path / "raw" / name, each)
        files.publish(tmp_path / "raw", tmp_path / "published")
        return section.headline()

    small = [piece(REFERENCE, 4.0), *(piece(arm, 4.1, phases=OURS) for arm in ("disco", "upcycle", "expert-upcycling"))]
    title, rows = publish(small)
    assert "Dollars are those for the same tokens" in title
    assert [row[0] for row in rows] == ["ours", *RIVALS, "joint on the cheap pool"]
    assert rows[0][1:4] == ["+0.100", "-", "0.29"]
    elsewhere = [piece(arm, 2.0, corpus="another", phases=OURS) for arm in (REFERENCE, "disco")]  # with fewer arms
    assert publish(elsewhere) == (title, rows)
    large = [
        piece(REFERENCE, 3.0, budget=4),
        piece("disco", 3.2, budget=4, phases=OURS),
        piece(REFERENCE, 2.0, budget=16),
    ]
    title, rows = publish(large)
    assert f"{4 * cells.SMOKE.tokens:,} tokens" in title
    assert "Dollars are those to reach joint training's loss" in title
    assert rows[0][1:3] == ["+0.200", "+0.100"]
    assert float(rows[0][3]) == pytest.approx(0.29 * math.exp(0.2 / (1.0 / math.log(4))), abs=0.01)
    assert rows[1] == [RIVALS[0], "not measured", "-", "-", "-", "-", "-"]
    far = [piece("upcycle", 4.1, budget=4, phases=OURS), piece("expert-upcycling", 1.9, budget=4, phases=OURS)]
    title, rows = publish(far)
    assert "Dollars are those to reach joint training's loss" in title
    assert (rows[1][3][:2], rows[2][3][:2]) == ("< ", "> ")
    assert (float(rows[1][3][2:]), float(rows[2][3][2:])) == (
        pytest.approx(0.29 / 4, abs=0.01),
        pytest.approx(0.29 * 4, abs=0.03),
    )
    assert {len(row) for row in rows} == {len(section.HEADLINE)}


def test_the_section_appears_only_with_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section, "PUBLISHED", tmp_path)
    assert "## Where MoEs are sparse" not in document.page()
    files.write(tmp_path / "raw" / "report-1.json", piece(REFERENCE, 4.0))
    files.write(tmp_path / "raw" / "report-2.json", piece("disco", 4.1, phases=OURS))
    files.publish(tmp_path / "raw", tmp_path)
    page = document.page()
    assert "| ours | +0.100 | - | - | - | - | 0.29 |" in page
    assert "joint training's loss 4.000**" in page
    assert "`grid`; commit a1" in page
