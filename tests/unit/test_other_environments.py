"""Exported models in other programs, each in an environment of its own: their likeliest tokens are those of transformers 5."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import torch
from gguf_files import TEXT
from other_environments import TRANSFORMERS_4, VLLM, Program
from test_export import REPORT
from tiny_export import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from docs.ecosystem import VERSION
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.stages.export.directory import export
from moedisco_ray.stages.export.gguf_file import write_gguf

COUNT = 12
PROMPT = TEXT[0][:40]
KNOWN = {
    TRANSFORMERS_4: [
        name for name, page in DECLARATIONS.items() if name not in ("solar_open", "qwen3_5_moe_text") and page.module is None],
    VLLM: [
        name for name, page in DECLARATIONS.items()
        if name not in ("ernie4_5_moe", "gpt_oss", "phimoe") and not page.attention.latent
        and page.recurrence is None and page.module is None]}
"""Families that a program computes. vLLM reads gpt_oss only with scaled positions. On a CPU, vLLM 0.32 leaves out the correction of
ERNIE's router, and has a kernel for latent attention only if 512 + 64 numbers are cached per token. It leaves
out the bias of phimoe's output head."""
OTHER: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "moe_intermediate_size": 32}
"""Sizes for which vLLM has kernels: heads of 32 or more."""
ROWS = {
    TRANSFORMERS_4: "Use: Hugging Face directory in transformers 4.57",
    VLLM: "Use: Hugging Face directory in vLLM"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family as a run exports it."""
    home, found = tmp_path_factory.mktemp("models"), {}
    for family, page in DECLARATIONS.items():
        sizes = {} if page.attention.latent else OTHER
        (home / f"trained-{family}").mkdir()
        write_model(home / f"trained-{family}", family, **sizes)
        found[family] = home / family
        export(home / f"trained-{family}", home / f"trained-{family}", found[family], REPORT)
    return found


@pytest.fixture(scope="module")
def answers(models: dict[str, Path], request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a program answers: its version, and the continuation of each family that it has."""
    program: Program = request.param
    if program.python is None:
        pytest.skip(program.missing)
    known = KNOWN[program]
    found = program.continuations([models[family] for family in known], PROMPT, COUNT)
    return {"version": found["version"], **dict(zip(known, found["found"], strict=True))}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("answers", "family"), [
    pytest.param(program, family, id=f"{program.folder}-{family}", marks=pytest.mark.ecosystem(ROWS[program]))
    for program, families in KNOWN.items() for family in families], indirect=["answers"])
def test_a_program_continues_a_text_as_transformers_5_and_llama_cpp_do(
    models: dict[str, Path], answers: dict[str, Any], family: str, record_property: Callable[[str, object], None], tmp_path: Path,
) -> None:
    record_property(VERSION, answers["version"])
    ids = AutoTokenizer.from_pretrained(models[family])(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(models[family])
    expected = model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False)[0, len(ids):].tolist()
    assert answers[family]["ids"] == ids
    assert answers[family]["tokens"] == expected
    if DECLARATIONS[family].gguf is not None:
        write_gguf(models[family], tmp_path / "tiny.gguf", name="tiny")
        _, continued = llama_cpp.logprobs(tmp_path / "tiny.gguf", [ids], count=COUNT)
        assert continued == expected[:len(continued)]       # without the end of the text
        assert len(continued) >= len(expected) - 1
