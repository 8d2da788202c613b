"""Shows an advice as tables: the options, the settings to change, and the confidence."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from benchmarks.study.advice.advised import Advice, Option
from benchmarks.study.advice.confidence import Confidence
from moedisco_ray.cli.display.formatting import count, percent, plain_table
from moedisco_ray.core.bill import format_dollars

_STYLES = {"high": "green", "medium": "yellow", "low": "bold red"}
_WIDEST_FLAG = 60
_SOUGHT = {"loss": "loss", "dollars": "dollars", "ratio": "of joint's"}


def advice_view(advice: Advice) -> RenderableType:
    """The parts of an advice that a person needs for a decision."""
    goal, sure = advice.goal, advice.confidence
    given = f"for {dollars(goal.value)}" if goal.kind == "budget_dollars" else f"to a loss of {goal.value:.3f}"
    return Group(
        Text.assemble((advice.name, "bold"), f"  {given}: ", (advice.advised.title, "bold")),
        Text(_promise(advice)),
        Padding(_options(advice), (1, 0, 0, 0)),
        Padding(_settings(advice), (1, 0)),
        Text.assemble("How sure: ", (sure.level, _STYLES[sure.level])),
        _grounds(sure),
        *(Text(f"Set aside: {note}", style="dim") for note in advice.notes),
        Text(
            "Dollars are planned, of training, without the traffic between a gang's workers. An interval holds nine of ten "
            "resamplings; that the curves have the right form is assumed.", style="dim"))


def dollars(amount: float) -> str:
    """Format dollars, including amounts as small as a millionth."""
    return format_dollars(amount) if amount >= 0.001 else f"${amount:.2e}"


def _promise(advice: Advice) -> str:
    best = advice.advised
    interval = _interval(advice, best)
    between = "" if interval == "-" else f" ({interval})"
    if advice.sought == "loss":
        return f"{count(best.tokens)} tokens, predicted loss {best.loss:.3f}{between}"
    if advice.sought == "dollars":
        return f"{count(best.tokens)} tokens, predicted to cost {dollars(best.dollars)}{between}"
    return (
        f"{count(best.tokens)} tokens; joint training's loss for {percent(best.ratio or 0)} of its dollars{between}, "
        "where it was measured; the loss here is not predicted")


def _interval(advice: Advice, option: Option) -> str:
    if option.interval is None or option.interval[0] == option.interval[1]:
        return "-"
    low, high = (None if end is None else _figure(advice, end) for end in option.interval)
    return f"{low} or more" if high is None else f"{low} to {high}"


def _figure(advice: Advice, value: float | None) -> str:
    if value is None:
        return "-"
    return {"loss": f"{value:.3f}", "dollars": dollars(value), "ratio": percent(value)}[advice.sought]


def _options(advice: Advice) -> Table:
    table = plain_table("recipe", "runs", "tokens", _SOUGHT[advice.sought], "nine of ten", "best in")
    for column in table.columns:
        column.no_wrap = column is not table.columns[0]
    for number, option in enumerate(advice.options):
        value = {"loss": option.loss, "dollars": option.dollars, "ratio": option.ratio}[advice.sought]
        best_in = "dominated" if option.dominated else "-" if option.best_in is None else percent(option.best_in)
        table.add_row(
            option.title, str(option.runs), count(option.tokens), _figure(advice, value), _interval(advice, option), best_in,
            style="bold" if not number else "dim" if option.dominated else "")
    return table


def _settings(advice: Advice) -> RenderableType:
    if not advice.settings:
        return Text("Nothing to set: the configuration is as advised")
    flags = [f"--set {shlex.quote(f'{path}={_value(change.advised)}')}" for path, change in advice.settings.items()]
    table = plain_table("set", "instead of")
    table.columns[0].no_wrap = max(map(len, flags)) <= _WIDEST_FLAG     # text to copy stays on one line
    for flag, change in zip(flags, advice.settings.values(), strict=True):
        table.add_row(flag, _value(change.now))
    return table


def _grounds(confidence: Confidence) -> Table:
    table = Table.grid(padding=(0, 1))
    for ground in confidence.grounds:
        table.add_row(Text(f"  {ground.level}", _STYLES[ground.level]), ground.words)
    return table


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:_}" if type(value) is int else json.dumps(value)
