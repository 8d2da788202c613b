"""The sections of RESULTS.md on the corpus and the clusters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.harness import spread
from benchmarks.page_parts import at_least, at_most, made_with, number, read, section, span, spans, table


def corpus_engines() -> str:
    result = read("corpus_engines")
    rows, verdicts = [], []
    for cell in result["cells"]:
        size = _size(cell)
        rows.append(
            [
                size,
                str(cell["blocks"]),
                *(number(cell[arm]["mb_per_second"]["median"]) for arm in ("new", "old")),
                *(number(cell[arm]["mb_per_cpu_second"]["median"]) for arm in ("new", "old")),
                *(number(cell[arm]["driver_peak_mb"]["median"]) for arm in ("new", "old")),
                number(cell["new"]["spilled_mb"]["median"]),
                "yes" if cell["equal_bytes"] else "no",
            ]
        )
        target = result["targets"]["new_over_old"]
        verdicts.append(at_least(f"throughput, new / old, {size}", cell["new_over_old"]["mb_per_second"], target))
    return section(
        "The corpus stage on Ray Data next to an engine of our own",
        """The stage on Ray Data (new) and the staging, buckets and shuffle of our own that it replaced (old, commit
        a0c02aba), on one machine with two CPUs, from JSON Lines to packed tokens. Blocks are the tasks that read. The
        machine was not idle; arms took turns.""",
        table(
            [
                "text",
                "blocks",
                "MB/s, new",
                "old",
                "MB per CPU second, new",
                "old",
                "driver's peak in MB, new",
                "old",
                "spilled MB, new",
                "equal bytes",
            ],
            rows,
        ),
        "\n".join(verdicts),
        made_with(result),
    )


def corpus_blocks() -> str:
    result = read("corpus_blocks")
    rows, digests = [], dict[str, set[str]]()
    for cell in result["cells"]:
        size = _size(cell)
        figures = (cell[each] for each in ("mb_per_cpu_second", "driver_peak_mb", "spilled_mb"))
        rows.append([size, str(cell["blocks"]), *map(number, figures), ", ".join(cell["digests"])])
        digests.setdefault(size, set()).update(cell["digests"])
    verdicts = []
    for size, found in digests.items():
        blocks = ", ".join(row[1] for row in rows if row[0] == size)
        verdicts.append(f"* equal bytes, {size}, blocks {blocks}: {'met' if len(found) == 1 else '**missed**'}")
    return section(
        "The corpus stage with one block and with many",
        """The corpus on Ray Data from the same texts, read by one task or by many. A digest is that of all names and
        contents of the corpus. Other work had the processors first, so there is no speed here.""",
        table(["text", "blocks", "MB per CPU second", "driver's peak in MB", "spilled MB", "digest"], rows),
        "\n".join(verdicts),
        made_with(result),
    )


def _size(cell: Mapping[str, Any]) -> str:
    return f"{cell['megabytes']:,} MB" if "megabytes" in cell else f"{cell['documents']:,} short documents"


def corpus_scale() -> str:
    result = read("corpus_scale")
    setting, targets = result["setting"], result["targets"]
    assignment = [
        [
            f"{cell['documents']:,}",
            number(cell["driver_peak_mb"]),
            number(cell["task_peak_mb"]),
            number(cell["load_passes"]),
            f"{cell['largest_over_mean']:.4f}",
            number(cell["kmeans_seconds"]),
            number(cell["fit_seconds"]),
            number(cell["assign_seconds"]),
        ]
        for cell in result["assignment"]
    ]
    corpus = [
        [
            f"{int(size):,}",
            *spans(cell["mb_per_core_second"], "stage", "bare"),
            span(cell["stage_over_bare"]),
            number(cell["peak_mb"]),
        ]
        for size, cell in result["corpus"].items()
    ]
    verdicts = [
        at_most(
            "driver's peak memory in MB, most documents",
            spread([result["assignment"][-1]["driver_peak_mb"]]),
            targets["driver_peak_mb"],
        ),
        at_most(
            "peak of the corpus stage in MB, driver and tasks in one process, most text",
            spread([max(result["corpus"].items(), key=lambda item: int(item[0]))[1]["peak_mb"]]),
            targets["driver_peak_mb"],
        ),
        *(
            at_least(f"stage / bare, {size} MB", cell["stage_over_bare"], targets["stage_over_bare"])
            for size, cell in result["corpus"].items()
        ),
    ]
    return section(
        "Corpus and clusters as the text grows",
        f"""Synthetic documents with vectors of {setting["dimensions"]} dimensions in files, in {setting["clusters"]}
        clusters with a capacity of {setting["capacity"]} times the mean: the driver fits k-means and prices on samples,
        and tasks in {setting["workers"]} processes add up the loads and assign the documents. Peaks include about 400
        MB of libraries. The corpus stage, from JSON Lines to packed tokens in one process, is compared with
        `tokenizers` alone in MB of text per second of processor time.""",
        table(
            [
                "documents",
                "driver, MB",
                "largest task, MB",
                "passes",
                "largest / mean",
                "k-means, s",
                "balance, s",
                "assign, s",
            ],
            assignment,
        ),
        table(["MB of text", "stage, MB/s", "bare, MB/s", "stage / bare", "peak of the stage, MB"], corpus),
        "\n".join(verdicts),
        made_with(result),
    )
