from __future__ import annotations

import io
import re

import run_example
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moedisco_ray.core.records.run_record import RunReport
from service.commands.comparing import DIFFERENT_TEXT, comparison_view
from service.domain.comparison import (
    Difference,
    compared_samples,
    compared_sources,
    compared_stages,
    differing,
    same_text,
)
from service.schemas import Comparison

REPORT = RunReport.model_validate(run_example.report())
NOTHING = REPORT.model_copy(update={"stages": [], "samples": [], "evaluation": type(REPORT.evaluation)()})
VALUES = st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 1), max_size=2))
DOCUMENTS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abc"), st.one_of(VALUES, inner), max_size=3),
    max_leaves=6,
)


@given(DOCUMENTS)
def test_a_configuration_differs_from_itself_in_nothing(document):
    assert differing([document, document, document]) == []


@given(DOCUMENTS, DOCUMENTS)
def test_differences_are_the_same_in_either_order_with_values_exchanged(one, other):
    there = {each.setting: each.values for each in differing([one, other])}
    back = {each.setting: each.values[::-1] for each in differing([other, one])}
    assert there == back


def test_names_places_and_tags_are_no_difference_and_lists_are_compared_whole():
    first = {"name": "a", "output": "/runs/a", "tags": {"x": "1"}, "corpus": {"sources": [1, 2]}, "seed": 0}
    second = {"name": "b", "output": "/runs/b", "corpus": {"sources": [1]}, "seed": 0, "finetune": {"steps": 3}}
    assert differing([first, second]) == [
        Difference("corpus.sources", [[1, 2], [1]]),
        Difference("finetune.steps", [None, 3]),
    ]


def test_figures_of_other_text_are_not_comparable():
    lr, text = Difference("finetune.optimizer.lr", [1, 2]), Difference("corpus.sources", [[1], [2]])
    measured = REPORT.evaluation.model_copy(update={"tokens": REPORT.evaluation.tokens + 1})
    more = REPORT.model_copy(update={"evaluation": measured})
    assert same_text([lr], [REPORT, REPORT, NOTHING])
    assert not same_text([lr, text], [REPORT, REPORT])
    assert not same_text([lr], [REPORT, more])


def test_text_is_the_same_by_what_was_measured_whatever_it_is_called():
    text = Difference("corpus.sources", [["dataset://hills"], ["/texts/hills"]])
    same, other, without = (_measured_on(digest) for digest in ("11", "22", None))
    assert same_text([text], [same, same, NOTHING])
    assert not same_text([], [same, other])
    assert same_text([], [same, without])
    assert not same_text([text], [same, without])


def _measured_on(digest):
    return REPORT.model_copy(update={"evaluation": REPORT.evaluation.model_copy(update={"digest": digest})})


def test_a_run_without_a_figure_has_none_in_its_place():
    stages = compared_stages([NOTHING, REPORT])
    assert [stage.stage for stage in stages] == [stage.name for stage in REPORT.stages]
    assert {(stage.seconds[0], stage.dollars[0], stage.perplexity[0]) for stage in stages} == {(None, None, None)}
    assert [stage.dollars[1] for stage in stages] == [stage.dollars for stage in REPORT.stages]
    sources = compared_sources([REPORT, NOTHING])
    assert [each.source for each in sources] == ["all", *(each.source for each in REPORT.evaluation.sources)]
    assert sources[0].perplexity == [REPORT.evaluation.perplexity, None]
    assert [each.texts for each in compared_samples([REPORT, NOTHING])] == [[s.text, None] for s in REPORT.samples]


def test_a_run_and_its_retry_are_compared_by_its_owner_alone(api):
    first = api.submit()["id"]
    changes = {"finetune.optimizer.lr": 0.002, "corpus.validation_fraction": 0.1}
    second = api.ann.post(f"/v1/runs/{first}/retry", json={"changes": changes}).json()["id"]
    answer = api.ann.get("/v1/comparison", params={"run": [first, second]})
    assert answer.status_code == 200, answer.text
    found = Comparison.model_validate(answer.json())
    lr = api.ann.get(f"/v1/runs/{first}").json()["config"]["finetune"]["optimizer"]["lr"]
    assert [run.id for run in found.runs] == [first, second]
    assert {each.setting: each.values for each in found.settings} == {
        "corpus.validation_fraction": [0.02, 0.1],
        "finetune.optimizer.lr": [lr, 0.002],
    }
    assert not found.same_text
    shown = io.StringIO()
    Console(file=shown, width=200).print(comparison_view(found))
    assert DIFFERENT_TEXT in shown.getvalue()
    assert f"demo {second[-4:]}" in shown.getvalue()
    assert re.search(r"finetune.optimizer.lr +0.\d+ +0.002", shown.getvalue())
    assert api.client("bob").get("/v1/comparison", params={"run": [first, second]}).status_code == 404
    twice = api.ann.get("/v1/comparison", params={"run": [first, first]})
    assert (twice.status_code, twice.json()["errors"][0]["field"]) == (422, "query.run")
    assert api.ann.get("/v1/comparison", params={"run": first}).status_code == 422
