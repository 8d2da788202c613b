"""The grid's section of RESULTS.md and the table of docs/results.md, from results/pieces.jsonl."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.study.compare.arms import ARMS, REFERENCE
from benchmarks.study.grid.cells import SCALES, SHAPES
from benchmarks.study.grid.files import PUBLISHED, published
from benchmarks.study.grid.levers import LEVERS, WITH_ADAMW
from benchmarks.study.grid.pieces import HALF, OURS
from benchmarks.study.grid.prices import books
from benchmarks.study.grid.records import Dollars, Figures
from benchmarks.study.grid.summary import FURTHEST, JOINT_LOW, summarise
from moedisco_ray.core.limits import SAMPLED_DOCUMENTS
from moedisco_ray.stages.clustering.kmeans import RESTARTS

ROWS: Mapping[str, str] = {
    REFERENCE: "joint on the large card",
    OURS: "ours",
    "expert-upcycling": "Expert Upcycling, grown at 95 % of the tokens",
    "upcycle": "sparse upcycling at 95 %",
    HALF: "half of the experts, joint on the cheap pool",
    JOINT_LOW: "joint on the cheap pool",
    **{arm: each.title for arm, each in {**LEVERS, **WITH_ADAMW}.items()},
    **{arm: ARMS[arm].title for arm in ("paper", "btx", "random-clusters", "ensemble")},
}
"""Rows of a table, by arm; arms without a result have none."""
HEADLINE_ARMS = (OURS, "expert-upcycling", "upcycle", JOINT_LOW)
"""Arms of the table in docs/results.md."""
_MARKETS = tuple(books())
HEAD = [
    "arm",
    "gap, nats",
    "its slope",
    *(f"dollars, {name}" for name in _MARKETS),
    *(f"equal tokens, {name}" for name in _MARKETS),
    "hours, paper",
    "perplexity on other text",
]
HEADLINE = ["arm", "gap, nats", "its slope", *(f"dollars, {name}" for name in _MARKETS), "hours, paper"]
_UNKNOWN = "-"


def entries() -> list[Figures]:
    """The figures of the published pieces; empty if nothing is published."""
    return summarise(published(PUBLISHED))


def tables(found: Iterable[Figures]) -> dict[str, list[list[str]]]:
    """The rows of the tables by their titles, one table per cell and budget, the cell's largest budget first."""
    every = list(found)
    return {title(table): _rows(every, table) for table in _tables(every)}


def _rows(every: Sequence[Figures], table: Sequence[Figures]) -> list[list[str]]:
    return [
        _row(each, slope_of_gap(every, each), _joint(table))
        for arm in ROWS
        for each in table
        if arm == each.arm != REFERENCE
    ]


def headline() -> tuple[str, list[list[str]]]:
    """The table of docs/results.md: the main arms at our largest multiple of tokens, where most of them were measured.

    Returns:
        The title, and the rows under `HEADLINE`; arms without a result have a row that says so.
    """
    every = entries()
    table = _headline_table(every)
    to_loss = all(None not in each.dollars_to_joint_loss.model_dump().values() for each in table if each.arm == OURS)
    rows = []
    for arm in HEADLINE_ARMS:
        found = next((each for each in table if each.arm == arm), None)
        if found is None:
            rows.append([ROWS[arm], "not measured", *[_UNKNOWN] * (len(HEADLINE) - 2)])
            continue
        dollars = _to_joint_loss(found) if to_loss else _figures(found.dollars_equal_tokens)
        name = _name(found, _joint(table))
        rows.append([name, _gap(found), slope_of_gap(every, found), *dollars, f"{found.hours_ratio:.2f}"])
    meant = "to reach joint training's loss" if to_loss else "for the same tokens"
    about = f"Dollars are those {meant}, hours those for the same tokens; joint training on one large card is 1."
    return f"{title(table)}. {about}", rows


def headline_cell() -> list[Figures]:
    """The figures of that table's cell, at every budget."""
    every = entries()
    cell = _cell(_headline_table(every)[0])
    return [each for each in every if _cell(each) == cell]


def _headline_table(every: Sequence[Figures]) -> list[Figures]:
    return max(
        (table for table in _tables(every) if OURS in _arms(table)),
        key=lambda table: (
            table[0].budget_tokens // SCALES[table[0].scale].tokens,
            len(_arms(table) & set(HEADLINE_ARMS)),
            -_importance(table[0]),
            len(_joint(table).seeds),
        ),
    )


def _arms(table: Sequence[Figures]) -> set[str]:
    return {each.arm for each in table}


def title(table: Sequence[Figures]) -> str:
    """The cell, the budget and the seeds of a table, in words."""
    joint = _joint(table)
    how = "tuned" if joint.tuned else "at the starting values, not tuned"
    return (
        f"{'smaller model, ' if joint.scale == 'small' else ''}{joint.corpus}, {joint.family}, start {joint.start}, "
        f"{joint.experts} experts, top-{joint.top_k} ({entry_share(joint)} "
        f"active), {joint.budget_tokens:,} tokens, {_seeds(joint)}, {how}; joint training's "
        f"loss {joint.loss:.3f}{'' if joint.bits_per_byte is None else f' ({joint.bits_per_byte:.3f} bits per byte)'}"
    )


def slope_of_gap(every: Iterable[Figures], figures: Figures) -> str:
    """Change of an arm's gap for four times the tokens, over common seeds.

    It is measured between the cell's smallest and largest budget.
    """
    own = sorted(
        (each for each in every if (each.arm, _cell(each)) == (figures.arm, _cell(figures))),
        key=lambda each: each.budget_tokens,
    )
    first, last = own[0], own[-1]
    common = sorted(first.gaps.keys() & last.gaps.keys())
    if first.budget_tokens == last.budget_tokens or not common:
        return _UNKNOWN
    fourfold = math.log(last.budget_tokens / first.budget_tokens, 4)
    return f"{statistics.median(last.gaps[seed] - first.gaps[seed] for seed in common) / fourfold:+.3f}"


def _tables(every: Iterable[Figures]) -> list[list[Figures]]:
    found: dict[tuple[str | int | float, ...], list[Figures]] = {}
    for each in every:
        found.setdefault((*_cell(each), -each.budget_tokens), []).append(each)
    return [found[key] for key in sorted(found)]


def _cell(figures: Figures) -> tuple[str | int | float, ...]:
    return (figures.scale, figures.corpus, figures.family, figures.start, figures.active_share, figures.experts)


def _importance(figures: Figures) -> int:
    shape = (figures.experts, figures.top_k)
    return SHAPES.index(shape) if shape in SHAPES else len(SHAPES)


def entry_share(entry: Figures) -> str:
    """The active share of an entry, as a percentage."""
    return f"{100 * entry.active_share:.3g} %"


def prices() -> str:
    """The cards and prices of the price books, in words."""
    return "; ".join(
        f"{book.name}: {book.cheap.gpu} for ${book.cheap.price_per_hour:g} per hour at speed {book.cheap.speed:.2g}, "
        f"{book.large.gpu} for ${book.large.price_per_hour:g} at {book.large.speed:.2g}"
        for book in books().values()
    )


def earlier_clustering() -> str:
    """How pieces were clustered that were measured while this was a setting, in words; empty if there are none."""
    pieces = published(PUBLISHED)
    used = [
        (piece.recipe["clusters.restarts"], piece.recipe["clusters.sample"])
        for piece in pieces
        if "clusters.restarts" in piece.recipe
    ]
    return " ".join(
        f"In {used.count((restarts, sample))} of {len(pieces)} runs, k-means had {restarts} restarts on a sample of "
        f"{sample:,} documents; it now always has {RESTARTS} on {SAMPLED_DOCUMENTS:,}."
        for restarts, sample in dict.fromkeys(used)
    )


def made_with() -> str:
    """Software and machines with which the pieces were measured, each once."""
    made = [piece.made for piece in published(PUBLISHED)]
    parts = {
        "": [f"`{each.command}`" for each in made],
        "commit": [each.commit for each in made],
        "on": [f"{each.date}, {each.processor}, {each.cores} cores" for each in made],
        "with": [", ".join(map(" ".join, each.versions.items())) for each in made],
    }
    return "; ".join(f"{name} {', '.join(dict.fromkeys(values))}".strip() for name, values in parts.items())


def _joint(table: Sequence[Figures]) -> Figures:
    return next(each for each in table if each.arm == REFERENCE)


def _name(figures: Figures, joint: Figures) -> str:
    """The arm, with what it lacks of the table's title."""
    seeds = "" if figures.seeds == joint.seeds else f", {_seeds(figures)}"
    return f"{ROWS[figures.arm]}{seeds}{', not tuned' if joint.tuned and not figures.tuned else ''}"


def _seeds(figures: Figures) -> str:
    return f"{'seed' if len(figures.seeds) == 1 else 'seeds'} {', '.join(map(str, figures.seeds))}"


def _row(figures: Figures, slope: str, joint: Figures) -> list[str]:
    return [
        _name(figures, joint),
        _gap(figures),
        slope,
        *_figures(figures.dollars_to_joint_loss),
        *_figures(figures.dollars_equal_tokens),
        f"{figures.hours_ratio:.2f}",
        _UNKNOWN if figures.unseen is None else f"{figures.unseen:.3f}",
    ]


def _to_joint_loss(figures: Figures) -> list[str]:
    """Dollars to joint training's loss.

    For an arm that needs more than `FURTHEST` times its tokens, or less than 1 / `FURTHEST` of them, they are bounds.
    """
    if None not in figures.dollars_to_joint_loss.model_dump().values():
        return _figures(figures.dollars_to_joint_loss)
    sign, factor = (">", FURTHEST) if figures.loss_gap > 0 else ("<", 1 / FURTHEST)
    return [
        _UNKNOWN if value is None else f"{sign} {factor * value:.2f}"
        for value in map(functools.partial(getattr, figures.dollars_equal_tokens), _MARKETS)
    ]


def _gap(figures: Figures) -> str:
    spread = figures.loss_gap_spread
    several = f" ({spread.min:+.3f} to {spread.max:+.3f})" if len(figures.seeds) > 1 else ""
    return f"{figures.loss_gap:+.3f}{several}"


def _figures(dollars: Dollars) -> list[str]:
    return [
        _UNKNOWN if value is None else f"{value:.2f}" for value in map(functools.partial(getattr, dollars), _MARKETS)
    ]
