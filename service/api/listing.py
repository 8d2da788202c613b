"""Query parameters of lists of runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from service.api.security import Reader
from service.domain.run_list import FIELDS, NEWEST, Condition, Selection, parse_condition
from service.domain.states import RunState

MOST_CONDITIONS = 16
LONGEST_CONDITION = 100

_States = Annotated[list[RunState], Query(max_length=7, description="States of the runs; by default all.")]
_TagFilter = Annotated[str, Query(max_length=321, pattern=r"^[^:]{1,64}:.*$")]
_Tags = Annotated[list[_TagFilter], Query(max_length=32, description="Tags as `key:value`; a run must have all.")]
_Where = Annotated[
    list[Annotated[str, Query(max_length=LONGEST_CONDITION)]],
    Query(
        max_length=MOST_CONDITIONS,
        description="Conditions on figures, such as `perplexity<30`; a run must meet all, and have each figure.",
    ),
]
_Time = Annotated[float | None, Query(allow_inf_nan=False)]

OrderBy = Annotated[
    str,
    Query(
        max_length=64,
        description=f"Field to sort by, with `-` before it for descending: {', '.join(FIELDS)}. Runs without a value "
        f"come last. By default `{NEWEST}`, newest first.",
        examples=["perplexity"],
    ),
]
ListCursor = Annotated[
    str | None,
    Query(max_length=2048, description="`next_cursor` of the previous page of the same list, in the same order."),
]


def conditions(texts: list[str]) -> tuple[Condition, ...]:
    """Read the conditions of a request.

    Raises:
        InvalidRequest: A text is no condition.
    """
    return tuple(map(parse_condition, texts))


def _selection(
    caller: Reader,
    *,
    state: _States = [],  # noqa: B006 - FastAPI copies it
    owner: Annotated[str | None, Query(max_length=64, description="Owner of the runs.")] = None,
    project: Annotated[str | None, Query(max_length=64, description="Id or name of the runs' project.")] = None,
    name: Annotated[str | None, Query(max_length=128, description="Part of the run's name.")] = None,
    tag: _Tags = [],  # noqa: B006 - FastAPI copies it
    created_after: Annotated[_Time, Query(description="Earliest time of submission (seconds since the epoch).")] = None,
    created_before: Annotated[
        _Time, Query(description="Time before which the runs were submitted (seconds since the epoch).")
    ] = None,
    where: _Where = [],  # noqa: B006 - FastAPI copies it
) -> Selection:
    return Selection(
        person=caller.person,
        owner=owner,
        project=project,
        states=tuple(state),
        name=name,
        tags=dict(part.split(":", 1) for part in tag),
        created_after=created_after,
        created_before=created_before,
        where=conditions(where),
    )


Listed = Annotated[Selection, Depends(_selection)]
"""Filters of a list, from the query and the caller."""
