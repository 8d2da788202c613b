"""A run on conversations, token ids and plain text: what the loss counts, from the files to the figures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.validation import validate
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.corpus import build
from tests.unit.chat_data import WITH_TOOLS, conversation, tools_of, write_rows, write_tokenizer

CONVERSATIONS, LENGTH = 300, 64
ANSWERS = {"word": "the number is a question", "number": "it is the word grün"}


def config_of(
    home: Path, text: list[dict[str, Any]], total: int = 20_000, tokenizer: Path | None = None, **evaluation: Any
) -> RunConfig:
    """A run in a home that holds its tokenizer, unless that of another home is named."""
    recipe = {"batch_tokens": 512, "lr": 2e-3}
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 48,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return check_config(
        {
            "name": "chat",
            "output": str(home / "runs"),
            "corpus": {"sources": text, "validation_fraction": 0.1, "sequence_length": LENGTH},
            "tokenizer": {"path": str((tokenizer or home) / "tokenizer")},
            "model": {"family": "qwen3_moe", "config": sizes},
            "tokens": {"total": total, "seed_share": 0.3, "finetune_share": 0.3},
            "clusters": {"count": 2},
            "submodels": {"optimizer": recipe},
            "finetune": {"optimizer": recipe},
            "merge": {"calibration_tokens": 2048},
            "pools": {"low_memory": {"max_workers": 2}, "high_memory": {"workers": 1}},
            "evaluation": {"max_tokens": 100_000, "prompts": ["ab"], "every_tokens": 2048, **evaluation},
        }
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("chat"))


def write_sources(home: Path) -> Path:
    """Write a tokenizer with a chat template, conversations, token ids and plain text."""
    tokenizer = write_tokenizer(home / "tokenizer")
    write_rows(home / "chat.jsonl", "messages", [conversation(number) for number in range(CONVERSATIONS)])
    unseen = pa.table({"messages": [conversation(number) for number in range(1000, 1030)]})
    pq.write_table(unseen, home / "unseen.parquet")
    write_rows(
        home / "ids.jsonl",
        "input_ids",
        [tokenizer(f"the question {number} is a number " * 5)["input_ids"] for number in range(60)],
    )
    write_rows(home / "plain.jsonl", "text", [f"the word {number} is the answer " * 5 for number in range(60)])
    return home


SOURCES = [
    {"path": "chat.jsonl", "name": "chat", "messages_column": "messages"},
    {"path": "ids.jsonl", "name": "ids", "ids_column": "input_ids"},
    {"path": "plain.jsonl", "name": "plain"},
]


def sources(home: Path, *names: str) -> list[dict[str, Any]]:
    return [
        {**source, "path": str(home / source["path"])} for source in SOURCES if not names or source["name"] in names
    ]


def expected(home: Path) -> dict[str, tuple[list[int], list[bool]]]:
    """Tokens and mask of each rendered conversation by its text, as transformers makes them."""
    tokenizer = write_tokenizer(home / "reference")
    found = {}
    for number in range(CONVERSATIONS):
        rendered = tokenizer.apply_chat_template(
            conversation(number), return_dict=True, return_assistant_tokens_mask=True
        )
        text = tokenizer.apply_chat_template(conversation(number), tokenize=False)
        found[text] = rendered["input_ids"], [bool(each) for each in rendered["assistant_masks"]]
    return found


Packed = list[tuple[list[int], list[bool]]]


def documents_in(stream: TokenStream) -> tuple[list[int], Packed]:
    """Tokens of the stream's running text after the first, and the conversations with their masks, in order."""
    running: list[int] = []
    found: Packed = []
    for i in range(len(stream)):
        tokens, counts = stream.window(i).tolist(), [False, *stream.loss_mask(i).tolist()]
        if all(counts[1:]):
            running += tokens[1:]
            continue
        starts, filled = np.flatnonzero(stream.document_starts(i)).tolist(), stream.filled(i)
        for start, stop in itertools.pairwise([*(start for start in starts if start < filled), filled]):
            found.append((tokens[start:stop], counts[start:stop]))
    return running, sorted(found)


def test_a_run_counts_the_assistants_tokens_only(home: Path) -> None:
    unseen = [{"path": str(home / "unseen.parquet"), "name": "unseen", "messages_column": "messages"}]
    config = config_of(home, sources(home), sources=unseen)
    assert not validate(config).problems
    pipeline.run(config, backend=LocalBackend())
    reference, eos = expected(home), 0
    corpus = config.directory / "corpus"
    counted: dict[bool, int] = {}
    for held_out, folder in ((False, "train"), (True, "validation")):
        table = pa.concat_tables([pq.read_table(path) for path in sorted((corpus / folder).glob("*.parquet"))])
        running: list[int] = []
        talks: Packed = []
        for row in table.to_pylist():
            if row["source"] == "chat":
                assert (row["tokens"], row["loss_mask"]) == reference.pop(row["text"])
                talks.append((row["tokens"][: LENGTH + 1], row["loss_mask"][: LENGTH + 1]))
                assert row["packed"] == len(row["tokens"])
            else:
                assert row["loss_mask"] is None
                running += [*row["tokens"], eos]
        counted[held_out] = sum(sum(row["loss_mask"] or [True] * len(row["tokens"])) for row in table.to_pylist())
        if not held_out:
            trained = sorted(talk for talk in talks if any(talk[1]))
            tokens, found = documents_in(TokenStream([corpus / "shards"], LENGTH))
            assert tokens == running[1 : 1 + len(tokens)]
            assert found == trained
            shards = [config.directory / "clusters" / "shards" / str(k) for k in range(2)]
            clusters = [documents_in(TokenStream([path], LENGTH))[1] for path in shards]
            assert any(clusters)
            assert all(talk in trained for talk in itertools.chain(*clusters))
            assert any(len(talk[0]) > LENGTH for talk in talks)
    assert not reference
    report = read_json(config.directory / "report.json")
    assert report["evaluation"]["tokens"] == counted[True]
    by_source = {each["source"]: each["tokens"] for each in report["evaluation"]["sources"]}
    assert 0 < by_source["chat"] < by_source["chat"] + by_source["ids"] + by_source["plain"] == counted[True]
    tokenizer = write_tokenizer(home / "reference")
    assert report["evaluation"]["unseen"]["tokens"] == sum(
        sum(
            tokenizer.apply_chat_template(conversation(n), return_dict=True, return_assistant_tokens_mask=True)[
                "assistant_masks"
            ]
        )
        for n in range(1000, 1030)
    )
    exported, given = (folder / "chat_template.jinja" for folder in (config.directory / "model", home / "tokenizer"))
    assert exported.read_text() == given.read_text()
    losses = report["curves"]["finetune"]["loss"]
    assert np.isfinite(losses).all()


def test_the_exported_model_answers_in_its_template_and_ends_there(tmp_path: Path) -> None:
    def asked(topic: str, number: int) -> dict[str, str]:
        return {"role": "user", "content": f"what is the {topic} {number}?"}

    ends = write_tokenizer(tmp_path / "tokenizer").convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    path = write_rows(
        tmp_path / "asked.jsonl",
        "messages",
        [
            [asked(topic, number), {"role": "assistant", "content": answer}]
            for topic, answer in ANSWERS.items()
            for number in range(60)
        ],
    )
    config = config_of(tmp_path, [{"path": str(path), "messages_column": "messages"}], total=120_000)
    pipeline.run(config, backend=LocalBackend())
    exported = config.directory / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    for topic, answer in ANSWERS.items():
        prompt = tokenizer.apply_chat_template(
            [asked(topic, 7)], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        found = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(found) == f"{answer}<|im_end|>"
    assert read_json(exported / "generation_config.json")["eos_token_id"] == ends


def test_completions_and_tools_reach_the_corpus(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer", WITH_TOOLS)
    in_jsonl = [f"what is question {number} of jsonl?" for number in range(60)]
    in_csv = [f"what is question {number} of csv?" for number in range(60)]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"asked": prompt, "completion": " it is a word"}) + "\n" for prompt in in_jsonl)
    )
    (tmp_path / "pairs.csv").write_text(
        "asked,completion\n" + "".join(f"{prompt}, it is a word\n" for prompt in in_csv)
    )
    talks = [(conversation(number)[:-1], conversation(number)[-1:], tools_of(number)) for number in range(60)]
    rows = [dict(zip(("prompt", "completion", "tools"), talk, strict=True)) for talk in talks]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "talks.parquet")
    text = [
        {"path": str(tmp_path / "pairs.*"), "completion_column": "completion", "prompt_column": "asked"},
        {"path": str(tmp_path / "talks.parquet"), "completion_column": "completion", "tools_column": "tools"},
    ]
    config = config_of(tmp_path, text)
    corpus = config.corpus.model_copy(update={"max_document_tokens": 4096})
    (tmp_path / "made").mkdir()
    build(config.model_copy(update={"corpus": corpus}), tmp_path / "made")
    found = {
        row["text"]: (row["tokens"], sum(row["loss_mask"]))
        for folder in ("train", "validation")
        for row in pq.read_table(tmp_path / "made" / folder).to_pylist()
    }
    reference = {}
    for prompt in (*in_jsonl, *in_csv):
        whole = tokenizer(prompt + " it is a word" + tokenizer.eos_token)["input_ids"]
        reference[prompt + " it is a word"] = whole, len(whole) - len(tokenizer(prompt)["input_ids"])
    for prompt, completion, tools in talks:
        whole = tokenizer.apply_chat_template([*prompt, *completion], tools=tools)["input_ids"]
        begun = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True)["input_ids"]
        rendered = tokenizer.apply_chat_template([*prompt, *completion], tools=tools, tokenize=False)
        reference[rendered] = whole, len(whole) - len(begun)
    assert found == reference


def test_plain_text_has_no_masks(home: Path, tmp_path: Path) -> None:
    build(config_of(home, sources(home, "ids", "plain")), tmp_path)
    assert "conversations" not in read_json(tmp_path / "shards" / "index.json")
    assert not list((tmp_path / "shards").glob("*.mask"))


def test_the_corpus_does_not_depend_on_how_it_is_read(home: Path, tmp_path: Path) -> None:
    config = config_of(home, sources(home))
    for name, unit_bytes in (("one", 1 << 26), ("many", 1 << 12)):
        (tmp_path / name).mkdir()
        build(config, tmp_path / name, unit_bytes=unit_bytes)
    for path in (tmp_path / "one" / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / "shards" / path.name).read_bytes()


def test_rendered_conversations_of_another_run_are_refused(home: Path, tmp_path: Path) -> None:
    build(config_of(home, sources(home, "chat")), tmp_path)
    with pytest.raises(CorpusError, match="name the data set"):
        build(config_of(home, [{"path": str(tmp_path / "train")}]), tmp_path / "again")


def test_wrong_columns_name_the_file(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"messages": "hello"}) + "\n")
    for column, message in (
        ("messages", r"messages_column.*list of messages.*bad\.jsonl"),
        ("other", r"no such column"),
    ):
        with pytest.raises(CorpusError, match=message):
            build(config_of(home, [{"path": str(path), "messages_column": column}]), tmp_path / column)


@pytest.mark.slow
def test_an_owners_conversations_are_masked_where_they_stay(home: Path, tmp_path: Path) -> None:
    [chat] = sources(home, "chat")
    raw = config_of(home, sources(home, "ids", "plain")).model_dump(mode="json")
    raw["corpus"]["sources"].append({**chat, "owner": "ann"})
    raw["pools"]["owners"] = {"ann": {"storage": str(tmp_path / "ann"), "resource": "ann_gpu"}}
    raw |= {"output": str(tmp_path / "runs"), "finetune": {**raw["finetune"], "keep_optimizer_state": False}}
    directory = pipeline.run(check_config(raw), backend=LocalBackend())
    reference = expected(home)
    [storage] = (tmp_path / "ann").iterdir()
    for path in storage.glob("corpus/*/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert (row["tokens"], row["loss_mask"]) == reference.pop(row["text"])
    assert not reference
    counts = TokenStream([storage / "corpus" / "shards"], LENGTH)
    assert any(counts.loss_mask(0))
    assert not all(counts.loss_mask(0))
    units = read_json(directory / "submodels" / "manifest.json")["summary"]["units"]
    assert [(unit["name"], unit["steps"] > 0) for unit in units] == [("submodel-0", True), ("submodel-1", True)]
