from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.study.advice.common_ground import mean, shifts

Row = dict[int, float]
FIGURE = st.floats(-3, 3)


def means(rows: Sequence[Row], chosen: Sequence[int], subjects: int) -> list[float]:
    moved = shifts(rows, chosen, subjects)
    return [mean(row, moved, chosen) for row in rows]


def differences(rows: Sequence[Row], chosen: Sequence[int], subjects: int) -> list[float]:
    return [right - left for left, right in itertools.combinations(means(rows, chosen, subjects), 2)]


@st.composite
def tables(draw: st.DrawFn, *, complete: bool = False) -> tuple[list[Row], list[int], int]:
    """Rows whose subjects are all linked by chains of recipes; the chosen subjects; the number of subjects."""
    subjects, recipes = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    cells = {(recipe, draw(st.integers(0, subjects - 1))) for recipe in range(recipes)}
    for at in range(1, subjects):
        link = draw(st.integers(0, recipes - 1))
        cells |= {(link, at), (link, draw(st.integers(0, at - 1)))}
    if complete:
        cells = set(itertools.product(range(recipes), range(subjects)))
    rows = [{at: draw(FIGURE) for at in range(subjects) if (recipe, at) in cells} for recipe in range(recipes)]
    return rows, draw(st.lists(st.integers(0, subjects - 1), min_size=subjects, max_size=subjects)), subjects


@given(tables(), st.data())
def test_a_subject_where_all_is_easier_favours_none(table: tuple[list[Row], list[int], int], data: st.DataObject) -> None:
    rows, chosen, subjects = table
    easier = data.draw(st.lists(FIGURE, min_size=subjects, max_size=subjects))
    eased = [{at: figure - easier[at] for at, figure in row.items()} for row in rows]
    assert differences(eased, chosen, subjects) == pytest.approx(differences(rows, chosen, subjects), abs=1e-3)


@given(tables(complete=True))
def test_where_nothing_is_missing_the_means_are_plain(table: tuple[list[Row], list[int], int]) -> None:
    rows, chosen, _ = table
    assert means(*table) == pytest.approx([statistics.fmean(row[at] for at in chosen) for row in rows], abs=1e-9)


def test_two_recipes_differ_by_their_pairs() -> None:
    assert differences([{0: 5.0, 1: 1.0, 2: 1.5}, {1: 1.1, 2: 1.8, 3: -7.0}], range(4), 4) == pytest.approx([0.2])


def test_what_was_not_drawn_is_compared_where_it_was_measured() -> None:
    assert means([{0: 5.0, 1: 1.0}, {1: 1.1}], [0, 0], 2) == pytest.approx([5.0, 5.1], abs=1e-3)


def test_what_nothing_links_keeps_its_own_mean() -> None:
    assert means([{0: 1.0, 1: 2.0}, {1: 3.0}, {2: 9.0}], range(3), 3) == pytest.approx([1.5, 2.5, 9.0])


def test_what_is_never_reached_is_infinite_and_moves_no_other() -> None:
    assert means([{0: 1.0, 1: 2.0}, {0: 4.0, 1: float("inf")}], range(2), 2) == pytest.approx([1.5, float("inf")])
