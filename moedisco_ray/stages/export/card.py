"""The model card: `README.md` of the exported directory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.records.apart import apart_note, of_ensemble
from moedisco_ray.core.records.export_summary import ExportSummary, Sample
from moedisco_ray.core.records.findings import (
    TASK_COLUMNS,
    cluster_rows,
    evaluation_rows,
    expert_note,
    start_note,
    task_table,
    worse_than_start,
)
from moedisco_ray.core.records.report import TABLE_COLUMNS, report_notes, report_speeds, report_table, report_verdict
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.records.summaries import ClusterEntry, EvaluationRecord, Figures
from moedisco_ray.core.store.artifacts import read_manifest, write_text
from moedisco_ray.core.store.manifests import ADAPTER_FOLDER
from moedisco_ray.stages.export.front_matter import front_matter

_MOST_TERMS = 8
ENSEMBLE_CODE = "modeling_ensemble.py"
"""File with the code of an ensemble, next to its `config.json`."""
_NUMBERS = {
    "workers",
    "tokens",
    "time",
    "cost",
    "loss",
    "perplexity",
    "bits per byte",
    "documents",
    "cluster",
    *TASK_COLUMNS[1:],
}

_TASKS_LEGEND = (
    "Shares of right answers, with their standard errors, by lm-eval: of the likeliest choice, and of the likeliest "
    "for its length; of a text to complete, where the model would have written just that. Chance is what guessing gets."
)

_USAGE = """\
```python
{needed}from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory"{option})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory"{option})
inputs = tokenizer("The", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```"""

_ADAPTER = (
    f"`{ADAPTER_FOLDER}/` has the adapters of the fine-tune (LoRA) for PEFT, to apply to the weights before it. The "
    "weights in this directory contain them already."
)


def model_card(report: RunReport, figures: ExportSummary) -> str:
    """A model card in Markdown with YAML front matter; missing parts of the report are left out."""
    about = (
        f"A Mixture-of-Experts language model of the `{report.family}` family with {figures.parameters:,} "
        f"parameters, of which a token uses {figures.active_parameters:,}. {_recipe(report)}{_start(report)}"
    )
    sections = [
        front_matter(report, figures.facts),
        f"# {report.name}",
        *_warning(report.evaluation, report.evaluation),
        about,
        "## Use",
        _USAGE.format(option="", needed=_needed(report.family)),
        *([_ADAPTER] if figures.adapter else []),
        *_training(report, figures),
        *_clusters(report.clusters.clusters),
        *_evaluation(report.evaluation),
        *_samples(figures.samples),
        "## Made with",
        _made_with(report),
    ]
    return "\n\n".join(sections) + "\n"


def ensemble_card(report: RunReport, figures: ExportSummary) -> str:
    """A model card of a run's sub-models as an ensemble; the only results in it are those of the ensemble.

    Args:
        report: The run's report, finished or not.
        figures: Figures of the ensemble's export.
    """
    own = of_ensemble(report.evaluation)
    about = (
        f"An ensemble of language models of the `{report.family}` family, one per cluster of the text, which were "
        "never merged (c-BTM, [arXiv 2303.14177](https://arxiv.org/abs/2303.14177)). A router, which reads the text so "
        "far, mixes their next-token probabilities: the nearer the text is to a cluster, the more the model of that "
        f"cluster counts. All models run for every token; together they have {figures.parameters:,} parameters. Each "
        f"folder with a number is one of them.{_start(report)}"
    )
    apart = apart_note(report.evaluation)
    sections = [
        front_matter(report.model_copy(update={"evaluation": own}), figures.facts, ("ensemble", "custom_code")),
        f"# {report.name}",
        *_warning(own, report.evaluation),
        about,
        *([] if apart is None else [f"{apart[0].upper()}{apart[1:]}."]),
        "## Use",
        f"`{ENSEMBLE_CODE}` has the code. It needs transformers 5, and no package of ours.",
        _USAGE.format(option=", trust_remote_code=True", needed=""),
        *_training(report, figures),
        *_clusters(report.clusters.clusters),
        *_evaluation(own),
        *_samples(figures.samples),
        "## Made with",
        _made_with(report),
    ]
    return "\n\n".join(sections) + "\n"


def _training(report: RunReport, figures: ExportSummary) -> list[str]:
    legend = (
        "Loss is in nats per token, on training text, at the end of the stage; perplexity is on validation documents, "
        "a sub-model's on those of its own cluster. Costs are all slots that the run held, at the configured prices."
    )
    verdict = report_verdict(report)
    return [
        "## Training",
        _table(TABLE_COLUMNS, report_table(report)),
        legend + _rounding(figures),
        *([] if verdict is None else [verdict]),
        *(f"{note[0].upper()}{note[1:]}." for note in (*report_notes(report), *report_speeds(report))),
    ]


def _warning(figures: Figures, evaluation: EvaluationRecord) -> list[str]:
    worse = worse_than_start(figures, evaluation.start)
    return [] if worse is None else [f"> **{worse}.**"]


def _needed(family: str) -> str:
    declared = DECLARATIONS.get(family)
    if declared is None or declared.module is None:
        return ""
    return f"import {declared.module}  # transformers does not have {family}\n"


def write_card(model_dir: Path, report: RunReport) -> None:
    """Rewrite an exported model's card from the report of the complete run, which includes the export's cost."""
    manifest = read_manifest(model_dir)
    if manifest is not None:
        figures = ExportSummary.model_validate(manifest.summary)
        write = model_card if figures.submodels is None else ensemble_card
        write_text(model_dir / "README.md", write(report, figures))


def _recipe(report: RunReport) -> str:
    trained = {stage.name: stage for stage in report.stages if stage.tokens}
    finetune = trained.get("finetune")
    workers = f"{(finetune.pool if finetune else 'high_memory').replace('_', '-')} workers"
    if "submodels" in trained:
        end = f", and the whole was fine-tuned for a short time on {workers}" if finetune else ""
        return (
            "It was trained as MoE-DisCo ([arXiv 2601.06857](https://arxiv.org/abs/2601.06857)) describes: the text "
            "was clustered, a sub-model was trained on each cluster on a low-memory worker of its own, their experts "
            f"were put side by side, with one backbone and a router{end}."
        )
    if report.members is not None:
        return _by_members(report.members, len(report.syncs), f" It was then trained on {workers}." if finetune else "")
    if "seed" in trained:
        return (
            "It was upcycled: a dense model was trained on a low-memory worker, its experts were copied to all places, "
            f"and the whole was trained on {workers}."
        )
    return f"The whole of it was trained jointly, on {workers}."


def _by_members(members: int, syncs: int, end: str) -> str:
    if members == 1:
        return f"The whole of it was trained on a low-memory worker.{end}"
    return (
        f"The whole of it was trained by {members} members: each had a low-memory worker of its own and a part of the "
        f"text, and they combined all their weights {syncs} times, the last time after their last step (DiLoCo, "
        f"[arXiv 2311.08105](https://arxiv.org/abs/2311.08105)).{end}"
    )


def _start(report: RunReport) -> str:
    start = report.start
    if start is None or start.name is None:
        return ""
    dense = ", a dense model whose MLP became the experts" if start.kind == "upcycle" else ""
    return f" The weights that it started from are those of `{start.name}`{dense}."


def _rounding(figures: ExportSummary) -> str:
    dtype = figures.rounded_to
    if dtype is None:
        return ""
    return f" All of it was measured before the weights were rounded to {dtype} for this directory: results can differ."


def _clusters(clusters: Sequence[ClusterEntry]) -> list[str]:
    if not clusters:
        return []
    rows = [
        (str(number), f"{entry.documents:,}", f"{entry.tokens:,}", ", ".join(entry.terms[:_MOST_TERMS]))
        for number, entry in enumerate(clusters)
    ]
    return ["## Clusters", _table(("cluster", "documents", "tokens", "most typical words"), rows)]


def _evaluation(evaluation: EvaluationRecord) -> list[str]:
    if evaluation.is_empty:
        return []
    rows = [
        (
            name,
            _number(entry.loss, 4),
            _number(entry.perplexity, 2),
            _number(entry.bits_per_byte, 3),
            f"{entry.documents:,}",
            f"{entry.tokens:,}",
        )
        for name, entry in (*evaluation_rows(evaluation), *cluster_rows(evaluation))
    ]
    found = (start_note(evaluation), expert_note(evaluation), apart_note(evaluation))
    notes = [note for note in found if note is not None]
    tasks = task_table(evaluation)
    return [
        "## Validation",
        _table(("text", "loss", "perplexity", "bits per byte", "documents", "tokens"), rows),
        *(f"{note[0].upper()}{note[1:]}." for note in notes),
        *(["## Tasks", _table(TASK_COLUMNS, tasks), _TASKS_LEGEND] if tasks else []),
    ]


def _samples(samples: Sequence[Sample]) -> list[str]:
    # Samples are indented, not fenced: generated text may contain a code fence.
    if not samples:
        return []
    blocks = [_indented(sample.prompt + sample.text) for sample in samples]
    return ["## Samples", *[part for block in blocks for part in (block, "<!-- -->")]]


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _made_with(report: RunReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"Seed {report.seed}; {versions}."


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---:" if column in _NUMBERS else "---" for column in columns]
    lines = [columns, rule, *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
