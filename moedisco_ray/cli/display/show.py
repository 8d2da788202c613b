"""The view of a run's report: stages with time and cost, clusters, evaluation, samples."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moedisco_ray.cli.display.formatting import PlainTable, count
from moedisco_ray.core.records.apart import apart_note, keeps_apart, of_result
from moedisco_ray.core.records.export_summary import Sample
from moedisco_ray.core.records.findings import (
    TASK_COLUMNS,
    evaluation_rows,
    expert_note,
    learnt_notes,
    left_out,
    slope_note,
    start_note,
    task_table,
    worse_than_start,
)
from moedisco_ray.core.records.report import TABLE_COLUMNS, report_notes, report_speeds, report_table, report_verdict
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import ClusterEntry, Departure, EvaluationRecord
from moedisco_ray.core.stages import TRAINING
from moedisco_ray.core.store.locations import Location

_MOST_TERMS = 8


def report_view(report: RunReport) -> RenderableType:
    """A run's report; parts that were not measured are left out."""
    title = Text.assemble((report.name, "bold"), f"  {report.family}")
    worse = worse_than_start(of_result(report.evaluation), report.evaluation.start)
    parts: list[RenderableType] = [] if worse is None else [Text(worse, style="bold red")]
    parts += [title, *_state(report), _stages(report)]
    parts += [Text(f"! {note}", style="yellow") for note in (*report_notes(report), *left_out(report.corpus))]
    if (cut := report.decompose.note) is not None:
        parts.append(Text(f"{cut[0].upper()}{cut[1:]}.", style="dim"))
    parts += [Text(line, style="dim") for line in report_speeds(report)]
    parts += [Text(note.words, style="dim") for note in report.machines]
    if (verdict := report_verdict(report)) is not None:
        parts.append(Text(verdict, style="bold"))
    if report.clusters.clusters:
        heading = f"Clusters: {len(report.clusters.clusters)}, one sub-model each"
        parts.append(_section(heading, _clusters(report.clusters.clusters, report.evaluation)))
    if not report.evaluation.is_empty:
        parts.append(_section(f"Validation{_age(report, 'evaluate')}", evaluation_view(report.evaluation)))
        notes = [*learnt_notes(of_result(report.evaluation), report.corpus, report.tokens), *_slope(report)]
        parts += [Text(f"{note[0].upper()}{note[1:]}.") for note in notes]
    if report.left:
        parts.append(_section("What left the data owners' storages", _left(report.left)))
    if report.samples:
        heading = f"What the model writes{_age(report, 'export')}"
        parts.append(_section(heading, Group(*(_sample(sample) for sample in report.samples))))
    return Group(*parts)


def next_commands(run: Location, report: RunReport) -> Text:
    """What to do with a finished run."""
    copied = "the merged model" if keeps_apart(report.evaluation) else "the model"
    place = shlex.quote(str(run))
    commands = (
        (f"moedisco chat {place}", "talk to the model"),
        (f"moedisco plot {place}", "draw losses and costs"),
        (f"moedisco export {place} --to hf", f"copy {copied} as a Hugging Face directory"),
    )
    width = max(len(command) for command, _ in commands)
    return Text("\n".join(f"  {command:{width}}  {what}" for command, what in commands), "dim")


def _slope(report: RunReport) -> list[str]:
    whole = [stage.name for stage in TRAINING if stage.trains_whole]
    curve = next((curve for curve in report.curves.values() if curve.stage in whole), None)
    seconds = sum(stage.seconds for stage in report.stages if stage.name in whole)
    note = slope_note(curve, report.tokens, seconds)
    return [] if note is None else [note]


def _age(report: RunReport, name: str) -> str:
    return " (out of date)" if any(stage.outdated for stage in report.stages if stage.name == name) else ""


def _state(report: RunReport) -> list[RenderableType]:
    state, reason = report.state or "finished", report.state_reason
    if state == "finished":
        return []
    next_step = "" if state == "running" else "; `moedisco run` with the same configuration continues it"
    return [Text(f"{state}{f' ({reason})' if reason else ''}: figures of the stages so far{next_step}", style="yellow")]


def _section(title: str, content: RenderableType) -> RenderableType:
    return Padding(Group(Rule(title, align="left", style="dim"), content), (1, 0, 0, 0))


def _stages(report: RunReport) -> Table:
    table = PlainTable(*TABLE_COLUMNS)
    for row in report_table(report):
        if row[0] == "total":
            table.add_section()
        table.add_row(*row)
    return table


def _left(left: Sequence[Departure]) -> Table:
    table = PlainTable("owner", "bytes")
    table.add_column("what", overflow="fold")
    for each in left:
        table.add_row(each.owner, f"{each.bytes:,}", each.what)
    return table


def _clusters(clusters: Sequence[ClusterEntry], evaluation: EvaluationRecord) -> Table:
    measured = {entry.cluster: entry.perplexity for entry in evaluation.clusters}
    start = {} if evaluation.start is None else {entry.cluster: entry.perplexity for entry in evaluation.start.clusters}
    titles = ("tokens", "documents", *(["start"] if start else []), "perplexity")
    tokens = [entry.tokens for entry in clusters]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=1)
    table.add_column(width=16)
    for title in titles:
        table.add_column(justify="right", no_wrap=True, min_width=len(title))
    table.add_column(style="dim", overflow="ellipsis", no_wrap=True)
    table.add_row("", "", *(Text(title, "dim") for title in titles), "most typical words")
    for number, entry in enumerate(clusters):
        bar = ProgressBar(
            total=max(1, *tokens), completed=entry.tokens, width=16, complete_style="blue", finished_style="blue"
        )
        figures = [found.get(number) for found in ([start, measured] if start else [measured])]
        table.add_row(
            str(number),
            bar,
            count(entry.tokens),
            f"{entry.documents:,}",
            *("" if each is None else f"{each:.2f}" for each in figures),
            ", ".join(entry.terms[:_MOST_TERMS]),
        )
    return table


def evaluation_view(evaluation: EvaluationRecord) -> RenderableType:
    """A model's results on text and tasks; parts that were not measured are left out."""
    parts: list[RenderableType] = []
    if rows := evaluation_rows(evaluation):
        table = PlainTable("", "loss", "perplexity", "bits per byte", "documents", "tokens")
        for name, figures in rows:
            table.add_row(
                name,
                _number(figures.loss, 4),
                _number(figures.perplexity, 2),
                _number(figures.bits_per_byte, 3),
                _number(figures.documents, 0),
                _number(figures.tokens, 0),
            )
        parts.append(table)
    if (apart := apart_note(evaluation)) is not None:
        parts.append(Text(apart, style="bold"))
    if (comparison := start_note(of_result(evaluation))) is not None:
        parts.append(Text(comparison, style="bold"))
    if (note := expert_note(evaluation)) is not None:
        parts.append(Text(note, style="dim"))
    if tasks := task_table(evaluation):
        table = PlainTable(*TASK_COLUMNS)
        for row in tasks:
            table.add_row(*row)
        parts.append(Padding(table, (1, 0, 0, 0)) if parts else table)
    return Group(*parts)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _sample(sample: Sample) -> Panel:
    prompt, text = sample.prompt, sample.text
    body = re.sub(r"\n(\s*\n)+", "\n\n", text.removeprefix(prompt)).rstrip()  # small models write many blank lines
    return Panel(Text.assemble((prompt, "bold"), body), border_style="dim", expand=False)
