"""The grid: its summary, tables and picture."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import pytest
from grid_example import JOINT, OURS, TUNED, by_arm, cell, piece
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import document
from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.grid import cells, files, picture, pieces, prices, section, summary
from benchmarks.study.grid.records import PieceResult
from moedisco_ray.cli.figures import STYLE

RIVALS = ("Expert Upcycling, grown at 95 % of the tokens", "sparse upcycling at 95 %")


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
