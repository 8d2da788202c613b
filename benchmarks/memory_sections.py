"""The sections of RESULTS.md on memory."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import spread
from benchmarks.page_parts import at_least, at_most, made_with, number, prose, read, section, span, span_of, table
from service.planning.fork_server import Limits


def true_sizes() -> str:
    result = read("true_sizes")
    setting, targets = result["setting"], result["targets"]
    rows = [
        [
            arm,
            span(result["seconds"][arm]),
            span(result["own_mb"][arm]),
            span_of(result["mb_per_second"], arm),
            span_of(result["of_copy"], arm),
        ]
        for arm in result["seconds"]
    ]
    verdicts = [
        *(
            at_most(f"memory of {arm} in MB", result["own_mb"][arm], targets["own_mb"])
            for arm in ("merge", "evaluate", "export", "published")
        ),
        *(
            at_least(f"{name} / copy", result["of_copy"][name], targets["of_copy"])
            for name in ("join", "merge", "export")
        ),
    ]
    return section(
        "Merge, evaluation and export of a model that is larger than their memory",
        f"""An MoE of {setting["gigabytes"]:g} GB in bf16, merged from {setting["submodels"]} sub-models with backbones
        that differ, on one core without a GPU. Memory is the process's own, about 350 MB of libraries included, without
        pages of mapped files. Inputs come from the disk, and outputs are on the disk when the clock stops. *copy*:
        copies the merged model's files. *join*: joins the sub-models and writes the MoE. *merge*: the same with routers
        calibrated on {setting["calibration_tokens"]} tokens. *evaluate*: {setting["evaluated_tokens"]} tokens in fp32.
        *export*: writes the model in another dtype of the same size and compares it with the trained one, tensor by
        tensor and by the logits of 4 tokens. *published*: links the files and compares the logits.""",
        table(["arm", "seconds", "memory, MB", "MB/s written", "/ copy"], rows),
        "\n".join(verdicts),
        made_with(result),
    )


def fake_memory() -> str:
    result = read("fake_memory")
    targets, plans = result["targets"], result["plans"]
    steps = [(model, name, cell) for model, cells in result["steps"].items() for name, cell in cells.items()]
    measured = [(model, name, cell) for model, name, cell in steps if "refused" not in cell]
    seconds = spread([cell["seconds_of_few_layers"] for _, _, cell in measured])
    rows = [
        [
            model,
            name,
            number(cell["all_layers"] / 2**30),
            _percent(_error(cell, "formulas")),
            _percent(_error(cell, "scaled")),
            _percent(_error(cell, "scaled_peak")),
            number(cell["seconds_of_few_layers"]),
            number(cell["seconds_of_all_layers"]),
        ]
        for model, name, cell in measured
    ]
    needed = [
        [
            name,
            f"{cell['asked']:,}",
            f"{cell['settings']:,}",
            f"{cell['activations']:,}",
            number(cell["processor_seconds"]),
            number(cell["activations"] * seconds["median"]),
        ]
        for name, cell in plans.items()
    ]

    def largest(way: str) -> tuple[str, float]:
        return max([(model, _error(cell, way)) for model, _, cell in measured], key=lambda each: abs(each[1]))

    def in_words(way: str) -> str:
        model, error = largest(way)
        return f"{_percent(error)} % ({model})"

    first = [cell["activations"] * seconds["median"] for cell in plans.values()]
    verdicts = [
        at_most(f"largest error of {what}", spread([abs(largest(way)[1])]), targets["error"])
        for way, what in (
            ("formulas", "the formulas"),
            ("scaled", "scaled steps, each part of a step by itself"),
            ("scaled_peak", "scaled steps, by their peak"),
        )
    ]
    refused = [f"* {model}, {name}: refused, {cell['refused']}" for model, name, cell in steps if "refused" in cell]
    return section(
        "Memory of a plan: formulas or steps on FakeTensors",
        f"""Two training steps of sub-models of published checkpoints on FakeTensors, with GPUs' experts and attention
        patched in: torch without CUDA ends the process when autograd meets a fake CUDA tensor. *Scaled*: a model with a
        first, a last and each kind of layer, and one with a layer more, scaled to all layers. Errors compare with steps
        of all layers. A process that measures one setting takes
        {span(spread([cell["seconds"] for cell in result["cold"].values()]))} s, imports included, on a busy machine,
        and {span(spread([cell["processor_seconds"] for cell in result["cold"].values()]))} s of a processor; a
        measurement in a process that runs already {span(seconds)} s of a processor. A result that is cached by
        architecture and settings is read in {number(1000 * result["cached_seconds"])} ms.""",
        table(
            [
                "sub-model",
                "setting",
                "all layers, GiB",
                "formulas, %",
                "scaled by part, %",
                "scaled by peak, %",
                "scaled, processor s",
                "all layers, processor s",
            ],
            rows,
        ),
        "\n".join([*verdicts, *refused]),
        prose(
            """A plan tries settings until one fits. The table counts how often one plan asks for the memory of
            settings, how many of them differ, and with how many of these autograd saves something else: numbers of
            sequences, weights, moments and what workers exchange may stay formulas. The last column is the time of that
            many measurements."""
        ),
        table(
            [
                "plan, cheap cards",
                "asked",
                "settings",
                "activations",
                "plan by formulas, processor s",
                "measured, processor s",
            ],
            needed,
        ),
        prose(
            f"""The formulas stay. Their largest error is {in_words("formulas")}, that of scaled steps
            {in_words("scaled")}. A cached measurement is quick, but the first plan of a model takes
            {number(min(first))} to {number(max(first))} s of a processor, where a request to the service may take
            {Limits().processor_seconds}; and other clusters, sequence lengths or precisions are other keys of the
            cache. Of {result["lines"]["of formulas"]:,} lines of formulas, those for weights, moments and gangs would
            stay; GPUs' ways of experts and attention, which {result["lines"]["of fake steps"]:,} lines of tests patch
            in, would move into the product; and processes that plan, which import no torch today, would import it."""
        ),
        made_with(result),
        made_with(result["plans_made"]),
    )


def _error(cell: dict[str, Any], way: str) -> float:
    """Relative error of a memory that was found in one way, against that of all layers."""
    return float(cell[way] / cell["all_layers"] - 1)


def _percent(share: float) -> str:
    return f"{100 * share:+.1f}"
