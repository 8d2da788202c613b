"""Exported models in other programs, each in its own environment: the likeliest tokens are those of transformers 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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

from docs.ecosystem import ABSENT, FAMILY, PROGRAMS, VERSION
from moedisco_ray.contrib.gguf.file import write_gguf
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.stages.export.directory import export

COUNT = 12
PROMPT = TEXT[0][:40]
NAMES = {TRANSFORMERS_4: "transformers 4.57", VLLM: "vLLM"}
"""Programs by their names in `PROGRAMS`."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and what a program makes from it.

    Attributes:
        family: The family of the model.
        changes: Sizes and other settings.
        form: What distinguishes the model from others of its family.
        dtype: Data type of the weights and of the arithmetic.
        zero: Ends of the names of tensors that are zero.
        left_out: End of the name of a tensor that the program leaves out, so that it computes something else.
        error: What the program's error contains, if it refuses the model.
        in_gguf: Whether a GGUF file can hold such a model, if it can hold one of the family.
    """

    family: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: str = ""
    dtype: torch.dtype = torch.float32
    zero: tuple[str, ...] = ()
    left_out: str = ""
    error: str = ""
    in_gguf: bool = True


SIZES: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "moe_intermediate_size": 32}
"""Sizes for which vLLM has kernels: heads of 32 or more."""
LATENTS: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "intermediate_size": 64,
}
"""Latent attention with the sizes of published models, and a dense layer."""
GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
RECURRENT: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""Recurrent layers with heads as in published models."""


def _latent(family: str, form: str = "", scaling: Mapping[str, Any] | None = None, **fields: Any) -> Case:
    changes = {"hidden_size": 64, "fields": LATENTS | fields, "rope_scaling": scaling}
    return Case(family, changes, form, in_gguf=fields.get("topk_method", "greedy") == "greedy")


def _recurrent(
    family: str, form: str = "", dtype: torch.dtype = torch.bfloat16, error: str = "", **fields: Any
) -> Case:
    return Case(family, {**SIZES, "moe_intermediate_size": 96, **RECURRENT, **fields}, form, dtype, error=error)


def _yarn(mscale: float) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


_UNKNOWN = "Transformers does not recognize this architecture"
CASES: dict[Program, list[Case]] = {
    TRANSFORMERS_4: [
        Case(name, error=_UNKNOWN if name in ABSENT["transformers 4.57"] else "") for name in DECLARATIONS
    ],
    VLLM: [
        *(
            Case(name, SIZES)
            for name, page in DECLARATIONS.items()
            if not page.attention.latent
            and page.recurrence is None
            and name not in {"gpt_oss", "ernie4_5_moe", "phimoe", *ABSENT["vLLM"]}
        ),
        Case("llama_moe", SIZES, error=_UNKNOWN),
        _latent("deepseek_v2"),
        _latent("deepseek_v2", "groups", topk_method="group_limited_greedy", **GROUPS),
        _latent("deepseek_v2", "yarn", _yarn(0.707)),
        _latent("deepseek_v3"),
        _latent("deepseek_v3", "groups", _yarn(1.0), n_shared_experts=2, **GROUPS),
        Case("minimax_m2", {**SIZES, "rotary_dim": 16}, error="AssertionError()"),
        _latent("glm4_moe_lite"),
        Case("sarvam_mla", error="does not recognize this architecture"),
        Case("hy_v3", SIZES, error="has no attribute 'expert_hidden_dim'"),
        Case("deepseek_v3", {"hidden_size": 64}, "small", error="Head dimension 80 is not supported by MLA"),
        Case("gpt_oss", {**SIZES, "rope_parameters": YARN | {"truncate": False}}, "published", in_gguf=False),
        Case("gpt_oss", {**SIZES, "rope_parameters": YARN | {"factor": 1.0}}, "unscaled"),
        Case("gpt_oss", SIZES, "default", error="KeyError('factor')"),
        Case("ernie4_5_moe", SIZES, "new", zero=("e_score_correction_bias",)),
        Case("ernie4_5_moe", SIZES, "corrected", left_out="e_score_correction_bias"),
        Case("phimoe", {**SIZES, "fields": {"lm_head_bias": False}}, "without-bias"),
        Case("phimoe", SIZES, "with-bias", left_out="lm_head.bias"),
        _recurrent("qwen3_next"),
        _recurrent("qwen3_5_moe_text"),
        _recurrent("qwen3_next", "fp32", torch.float32, "CPU GDN attention requires BF16"),
        _recurrent(
            "qwen3_next",
            "small",
            error="Unexpected head dim size, 32",
            linear_key_head_dim=32,
            linear_value_head_dim=32,
        ),
    ],
}
"""What each program computes, and what it refuses or computes differently. New models of ERNIE have a correction of
zero. A yarn with the factor 1 scales nothing, but vLLM reads gpt_oss only with a yarn."""


def _parameters(chosen: Callable[[Case], bool]) -> list[Any]:
    return [
        pytest.param(
            program,
            case,
            id="-".join(filter(None, [program.folder, case.family, case.form])),
            marks=pytest.mark.ecosystem(PROGRAMS[NAMES[program]]),
        )
        for program, cases in CASES.items()
        for case in cases
        if chosen(case)
    ]


Made = Callable[[Case], Path]
Answer = Callable[[Program, Case], dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The model of a case as a run exports it."""
    models: list[tuple[Case, Path]] = []

    def model(case: Case) -> Path:
        for known, path in models:
            if known == case:
                return path
        home = tmp_path_factory.mktemp(case.family)
        (home / "trained").mkdir()
        write_model(home / "trained", case.family, case.dtype, case.zero, **case.changes)
        export(home / "trained", home / "trained", home / "model", REPORT)
        models.append((case, home / "model"))
        return home / "model"

    return model


@pytest.fixture(scope="module")
def answer(made: Made, request: pytest.FixtureRequest) -> Answer:
    """What a program answers to a case, with its version. It is started once, for all of its selected cases."""
    found: dict[Program, dict[str, Any]] = {}
    asked = [each.callspec.params for each in request.session.items if "case" in getattr(each, "fixturenames", ())]

    def of(program: Program, case: Case) -> dict[str, Any]:
        if program.python is None:
            pytest.skip(program.missing)
        cases = [each["case"] for each in asked if each["program"] == program]
        if program not in found:
            found[program] = program.continuations([made(each) for each in cases], PROMPT, COUNT)
        return {"version": found[program]["version"], **found[program]["found"][cases.index(case)]}

    return of


def continued(directory: Path, left_out: str = "") -> tuple[list[int], list[int]]:
    """The ids of the text, and transformers' likeliest tokens after it, without a tensor of the model."""
    ids = AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory)
    for name, tensor in model.state_dict().items():
        if left_out and name.endswith(left_out):
            tensor.zero_()
    return ids, model.generate(torch.tensor([ids]), max_new_tokens=COUNT, do_sample=False)[0, len(ids) :].tolist()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("program", "case"), _parameters(lambda case: not case.error and not case.left_out))
def test_a_program_continues_a_text_as_transformers_5_and_llama_cpp_do(
    program: Program, case: Case, made: Made, answer: Answer, record_property: Callable[[str, object], None]
) -> None:
    found = answer(program, case)
    record_property(VERSION, found["version"])
    record_property(FAMILY, case.family)
    directory = made(case)
    ids, expected = continued(directory)
    assert "error" not in found, found["error"]
    assert found["ids"] == ids
    assert found["tokens"] == expected
    if DECLARATIONS[case.family].gguf is not None and case.in_gguf:
        write_gguf(directory, directory.parent / "tiny.gguf", name="tiny")
        _, tokens = llama_cpp.logprobs(directory.parent / "tiny.gguf", [ids], count=COUNT)
        assert tokens == expected[: len(tokens)]  # without the end of the text
        assert len(tokens) >= len(expected) - 1


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("program", "case"), _parameters(lambda case: bool(case.left_out)))
def test_a_program_leaves_out_a_tensor(program: Program, case: Case, made: Made, answer: Answer) -> None:
    """If this fails with a later version, docs/ecosystem.py can say that the program computes the whole model."""
    tokens = answer(program, case)["tokens"]
    assert tokens == continued(made(case), case.left_out)[1]
    assert tokens != continued(made(case))[1]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("program", "case"), _parameters(lambda case: bool(case.error)))
def test_a_program_refuses_a_model(program: Program, case: Case, answer: Answer) -> None:
    assert case.error in answer(program, case).get("error", "none")
