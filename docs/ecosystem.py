"""The table of other programs and formats that tests have shown to work, and the plugin of pytest that records it.

A test names its row, and the packages whose versions the row shows: `@pytest.mark.ecosystem("Start: GGUF file",
"gguf")`. `make test-ecosystem` runs these tests with this plugin, which writes the results to `RECORD`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from moedisco_ray.contrib.gguf.splits import KNOWN
from moedisco_ray.core.families import DECLARATIONS, Family

RECORD = Path(__file__).with_suffix(".json")
TRACKERS = RECORD.parents[1] / "build" / "environments" / "trackers"
"""Folder of the trackers' libraries, which the development tools do not include. All tests of the session can import
them."""
HEAD = ["what", "tested with", "result"]
MARK = "ecosystem"
MEASURED = "measured"
"""Name under which a test records a text for its row, with pytest's `record_property`."""
VERSION = "version"
"""Name under which a test records a package of another environment with its version, such as `vllm 0.32.0`."""
FAMILY = "family"
"""Name under which a test records the family whose models its program computes."""
TOKENIZER = "tokenizer"
"""Name under which a test records the published tokenizer that llama.cpp reads."""
PROGRAMS = {
    "transformers 5": "Use: Hugging Face directory in transformers",
    "transformers 4.57": "Use: Hugging Face directory in transformers 4.57",
    "vLLM": "Use: Hugging Face directory in vLLM",
    "llama.cpp": "Use: GGUF file in llama.cpp",
}
"""Programs that compute models, with the rows of their tests."""
UNKNOWN = "does not know it"
ABSENT: Mapping[str, Mapping[str, str]] = {
    "transformers 5": {},
    "transformers 4.57": {name: UNKNOWN for name, family in DECLARATIONS.items() if not family.in_transformers_4},
    "vLLM": {
        "llama_moe": UNKNOWN,
        "sarvam_mla": UNKNOWN,
        "minimax_m2": "stops with an error on a CPU",
        "hy_v3": "reads configuration fields that transformers does not write",
    },
    "llama.cpp": {name: family.not_in_gguf for name, family in DECLARATIONS.items() if family.gguf is None},
}
"""Families that a program does not compute, with the reason, as the end of a sentence with the program as subject."""
_LATENTS = (
    "on a CPU only with `kv_lora_rank` 512 and `qk_rope_head_dim` 64, without `--enforce-eager`, and in fp32 on one "
    "with AMX only with `--attention-backend CPU_MLA`"
)
_RECURRENT = "on a CPU only with `--dtype bfloat16` and heads of the recurrent layers from 64"
ONLY: Mapping[str, Mapping[str, str]] = {
    "transformers 5": {"llama_moe": "after `import moedisco_ray.models`"},
    "vLLM": {
        "deepseek_v2": _LATENTS,
        "deepseek_v3": _LATENTS,
        "glm4_moe_lite": _LATENTS,
        "qwen3_next": _RECURRENT,
        "qwen3_5_moe_text": _RECURRENT,
        "gpt_oss": "if positions are scaled by `yarn`, with all its parameters",
        "ernie4_5_moe": "on a CPU only if the bias for the selection is zero",
        "phimoe": "if the head has no bias",
    },
}
"""Under which condition a program computes a family, where there is one."""
NOTES = """\
* *yes*: the likeliest tokens after a text are those of this package's model, for small models with random weights.
  transformers 5 also gives the same logits, bit by bit, and llama.cpp the same logarithms of probabilities, within
  0.0002. vLLM was tested on a CPU.
* `gpt_oss` in vLLM: published models have such positions. In a new model, `model.config.rope_scaling` with
  `rope_type: yarn`, `factor: 1.0`, `beta_fast: 32.0`, `beta_slow: 1.0` and `original_max_position_embeddings` scales
  nothing, and vLLM reads it.
* `ernie4_5_moe` in vLLM: the bias is zero in new models and in those from a dense start, because it is not trained.
  Published MoEs may have another one, which vLLM leaves out on a CPU.
* `phimoe` in vLLM: it leaves out the bias of the output head, which Phi-3.5-MoE and new models have. Set
  `lm_head_bias: false` in `model.config.fields` of a new model.
* `deepseek_v2` and `deepseek_v3` in vLLM: the sizes are those of published models; new models have smaller ones by
  default. With `--enforce-eager` on a CPU, vLLM rotates positions wrongly.
* llama.cpp needs the values in the table; `moedisco export --to gguf` refuses other models."""


TOKENIZER_NOTES = """\
* *yes*: llama.cpp encodes hard texts as transformers does, with the published files.
* *untested*: tokenizers with the same rules pass the same tests, but no package that tests could install carries the
  published files.
* *no*: this package does not know the rules of this name, so `moedisco export --to gguf` refuses the tokenizer in one
  line; use `--to hf`."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published tokenizer.

    Attributes:
        name: The models that have it.
        split: What llama.cpp calls its way of splitting text; None: it is SentencePiece's.
        package: The end of the name of the package that carries it for tests; None: no package is known.
        family: Family of the model that a test stores with it.
        approximate: Whether llama.cpp splits letters with combining marks in another way.
    """

    name: str
    split: str | None
    package: str | None = None
    family: str = "qwen3_moe"
    approximate: bool = False


TOKENIZERS = (
    Published("Qwen2, Qwen3", "qwen2", "qwen3"),
    Published("Qwen3.5", "qwen35"),
    Published("Llama 3", "llama-bpe", "llama3_1", "mixtral"),
    Published("DeepSeek-V3, DeepSeek-R1", "deepseek-v3", "deepseek_v3", "deepseek_v3"),
    Published("gpt-oss", "gpt-4o", "gptoss", "gpt_oss", approximate=True),
    Published("SmolLM2", "smollm"),
    Published("Mixtral, Llama 2", None),
    Published("Mistral Nemo", "tekken", approximate=True),
    Published("GLM-4.5, GLM-4.7-Flash", "glm4"),
    Published("OLMoE", "olmo"),
    Published("Granite 3", "refact"),
    Published("DeepSeek-V2", "deepseek-llm"),
    Published("MiniMax-M2", "minimax-m2"),
    Published("Kimi-K2", "kimi-k2"),
    Published("Solar Open", "solar-open"),
)
"""Published tokenizers of the supported families and of their dense starts."""
_SAME = {"glm4": "dbrx", "refact": "smollm", "olmo": "gpt-2"}
"""Names in llama.cpp for a split that has another name here, too."""


def tokenizers(record: Path = RECORD) -> Iterator[list[str]]:
    """A row per published tokenizer: whether a GGUF file can hold it, by the last complete run of the tests."""
    found = json.loads(record.read_text(encoding="utf-8"))
    passed = {name for row in found.values() for name in row.get("tokenizers", ())}
    for row in TOKENIZERS:
        known = row.split is None or _SAME.get(row.split, row.split) in KNOWN
        result = "yes" if row.name in passed else "untested" if known else "no"
        if row.approximate and result != "no":
            result += ", but for letters with combining marks"
        yield [row.name, "SentencePiece" if row.split is None else f"`{row.split}`", result]


def rows(record: Path = RECORD) -> Iterator[list[str]]:
    """The rows of the table, as the last complete run of the tests left them."""
    for what, row in json.loads(record.read_text(encoding="utf-8")).items():
        count, skipped = row["passed"] + row["failed"], "; ".join(row["skipped"])
        result = f"passed ({count} {'test' if count == 1 else 'tests'})" if count else f"skipped: {skipped}"
        result = f"**failed** ({row['failed']} of {count} tests)" if row["failed"] else result
        parts = [result, *row[MEASURED], *([f"skipped in part: {skipped}"] if count and skipped else [])]
        versions = [*(f"{name} {found}" for name, found in row["versions"].items()), *row.get("elsewhere", [])]
        yield [what, ", ".join(versions), "; ".join(parts)]


def families(record: Path = RECORD) -> Iterator[list[str]]:
    """A row per family: which programs compute it, by the last complete run of the tests, and why others do not."""
    found = json.loads(record.read_text(encoding="utf-8"))
    for family in DECLARATIONS.values():
        yield [
            f"`{family.name}`",
            *(_computes(program, found.get(row, {}), family) for program, row in PROGRAMS.items()),
        ]


def _computes(program: str, row: Mapping[str, Any], family: Family) -> str:
    if reason := ABSENT[program].get(family.name):
        return f"no: {reason}"
    if family.name not in row.get("families", ()):
        return "not tested"
    only = _in_gguf(family) if program == "llama.cpp" else ONLY.get(program, {}).get(family.name, "")
    return f"yes, {only}" if only else "yes"


def _in_gguf(family: Family) -> str:
    if family.gguf is None:
        return ""
    needed = [f"`{name}: {' or '.join(map(json.dumps, values))}`" for name, values in family.gguf.fixed.items()]
    needed += [f"`{name}` equal to `{other}`" for name, other in family.gguf.same.items()]
    return f"only with {', '.join(needed)}" if needed else ""


class Recorder:
    """Collects the results of tests by the row that they name, and writes them when the last test has ended.

    A session of some files or names only keeps the rows of all other tests. In the rows of tests that a name selects,
    it keeps the families and the number of passed tests of before, so that `-k FAMILY` adds a family.
    """

    def __init__(self, record: Path = RECORD) -> None:
        self._record = record
        self._rows: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:  # properties of an item arrive with its reports, also from other processes
            item.user_properties += [(MARK, list(mark.args)) for mark in item.iter_markers(MARK)]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for what, *packages in (value for name, value in report.user_properties if name == MARK):
            row = self._rows.setdefault(
                what,
                {
                    "versions": {name: _version(name) for name in packages},
                    "elsewhere": [],
                    "passed": 0,
                    "failed": 0,
                    "skipped": [],
                    MEASURED: [],
                    "families": [],
                    "tokenizers": [],
                },
            )
            if report.failed:
                row["failed"] += 1
            elif report.skipped and isinstance(report.longrepr, tuple):
                row["skipped"] = sorted({*row["skipped"], report.longrepr[2].removeprefix("Skipped: ")})
            elif report.when == "call":
                row["passed"] += 1
                row[MEASURED] += [value for name, value in report.user_properties if name == MEASURED]
                found = {value for name, value in report.user_properties if name == VERSION}
                row["elsewhere"] = sorted({*row["elsewhere"], *found})
                families = {value for name, value in report.user_properties if name == FAMILY}
                row["families"] = sorted({*row["families"], *families})
                named = {value for name, value in report.user_properties if name == TOKENIZER}
                row["tokenizers"] = sorted({*row["tokenizers"], *named})

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        complete = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not hasattr(
            session.config, "workerinput"
        )
        if self._rows and complete:
            whole = (
                session.config.args_source is not pytest.Config.ArgsSource.ARGS and not session.config.option.keyword
            )
            others = json.loads(self._record.read_text(encoding="utf-8")) if not whole and self._record.exists() else {}
            for what, row in self._rows.items():
                if session.config.option.keyword and (before := others.get(what)) is not None:
                    row["families"] = sorted({*row["families"], *before["families"]})
                    row["passed"] = max(row["passed"], before["passed"])
            text = json.dumps(dict(sorted({**others, **self._rows}.items())), indent=2)
            self._record.write_text(f"{text}\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if TRACKERS.is_dir():
        sys.path.append(str(TRACKERS))
    config.pluginmanager.register(Recorder())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
