from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.corpus import input_identity
from moedisco_ray.stages.text.pretrained import check_tokenizer, open_encoder, prepare_tokenizer
from moedisco_ray.stages.text.tokenizer import ENCODING, Encoder, save_trained, train_bpe

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße aus Köln — 日本語 🙂", "the cat <|endoftext|> sat", "  spaces\t\n"] * 5
MOE = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "vocab_size": 500}


@pytest.fixture
def trained(tmp_path):
    save_trained(train_bpe(TEXTS, 400), tmp_path / "trained")
    return tmp_path / "trained"


def run_config(tmp_path, **sections):
    (tmp_path / "text.txt").write_text("text")
    return check_config({"name": "t", "corpus": {"sources": [{"path": str(tmp_path / "text.txt")}]}, **sections})


def start_from(directory, tmp_path, **sections):
    """A run that starts from an MoE directory."""
    own = {
        "model": {"init": {"checkpoint": str(directory)}},
        "tokens": {"seed_share": 0},
        "clusters": {"vectors": "tfidf_svd"},
    }
    return run_config(tmp_path, **own, **sections)


def pretrained(directory: Path, **settings) -> Path:
    """A model directory; only its tokenizer and configuration matter here."""
    save_trained(train_bpe(["other text " + text for text in TEXTS], 400), directory)
    (directory / ENCODING).unlink()
    stored = directory / "tokenizer_config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | settings))
    (directory / "config.json").write_text(json.dumps(MOE))
    return directory


def test_trained_tokenizer_is_what_auto_tokenizer_loads(trained):
    encoder, loaded = Encoder(trained), AutoTokenizer.from_pretrained(trained)
    assert (encoder.eos, encoder.bos, encoder.prefix) == (0, None, 0)
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 0)
    assert encoder.vocab_size == len(loaded) <= 400
    for text, ids in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
        assert 0 not in ids  # the characters of the special token, not the token
        if "<|" not in text:
            assert loaded(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_training_again_gives_the_same_tokenizer(trained, tmp_path):
    save_trained(train_bpe(iter(TEXTS), 400), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", ENCODING):
        assert (trained / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_prepared_tokenizer_has_its_source_s_files_and_template_as_they_were(tmp_path):
    source = pretrained(tmp_path / "source", extra_special_tokens={"eot_token": "<|eot|>"}, model_max_length=77)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    prepare_tokenizer(source, tmp_path / "prepared")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "prepared" / name).read_bytes() == (source / name).read_bytes(), name
    assert not (tmp_path / "prepared" / "config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "prepared").chat_template == "{{ messages }}"
    added = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids("<|eot|>")
    assert Encoder(tmp_path / "prepared").vocab_size == added + 1


def test_vocabulary_and_merges_are_enough(trained, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    (plain / "vocab.json").write_text(json.dumps(model["vocab"]))
    (plain / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    prepare_tokenizer(plain, tmp_path / "saved")
    again, encoder = Encoder(tmp_path / "saved"), Encoder(trained)
    assert again.eos == encoder.eos
    assert [ids.tolist() for ids in again.encode(TEXTS)] == [ids.tolist() for ids in encoder.encode(TEXTS)]


def test_a_tokenizer_whose_class_follows_from_its_model_keeps_it(trained, tmp_path):
    """Without `config.json` next to it, transformers would take it for another class."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copyfile(trained / "tokenizer.json", source / "tokenizer.json")
    (source / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    prepare_tokenizer(source, tmp_path / "prepared")
    original, copy = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "prepared")
    for text in TEXTS:
        assert copy(text)["input_ids"] == original(text)["input_ids"]
    ids = Encoder(tmp_path / "prepared").encode(["def f(x)"])[0].tolist()
    assert ids == original("def f(x)", add_special_tokens=False)["input_ids"]


def test_its_own_special_tokens_are_kept_and_a_missing_end_is_added(tmp_path):
    word_level = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[END]": 2}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.enable_truncation(1)
    for name in ("own", "none"):
        (tmp_path / name).mkdir()
        word_level.save(str(tmp_path / name / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "[END]"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "chat_template": "x"}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("own", "none"):
        prepare_tokenizer(tmp_path / name, tmp_path / f"{name}-saved")
    own, none = Encoder(tmp_path / "own-saved"), Encoder(tmp_path / "none-saved")
    assert (own.eos, own.vocab_size) == (2, 3)
    assert (none.eos, none.vocab_size) == (3, 4)
    assert none.encode(["a a a"])[0].tolist() == [1, 1, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "own-saved").chat_template == "x"
    assert AutoTokenizer.from_pretrained(tmp_path / "none-saved").eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("model", "end"),
    [
        ({"model_type": "qwen3_moe", "eos_token_id": 7}, 7),
        ({"model_type": "qwen3_moe", "eos_token_id": [9999, 7]}, 7),
        ({"model_type": "qwen3_5_moe", "text_config": {"eos_token_id": 7}}, 7),
        ({"model_type": "qwen3_5_moe", "eos_token_id": 7, "text_config": {}}, 7),
        ({"model_type": "qwen3_5_moe", "eos_token_id": 8, "text_config": {"eos_token_id": 7}}, 7),
        ({"model_type": "qwen3_5_moe", "text_config": {"eos_token_id": None}}, 0),
        ({"model_type": "qwen3_moe"}, 0),
    ],
)
def test_a_tokenizer_without_an_end_gets_that_of_its_model_or_a_common_one(trained, tmp_path, model, end):
    """A composite model has its end token in the part for text, or next to it."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(trained / "tokenizer.json", source)
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": None})
    )
    (source / "config.json").write_text(json.dumps(model))
    assert AutoTokenizer.from_pretrained(source).eos_token is None
    prepare_tokenizer(source, tmp_path / "prepared")
    assert (open_encoder(source).eos, Encoder(tmp_path / "prepared").eos) == (end, end)


@pytest.mark.parametrize("adds", [True, False])
def test_documents_begin_with_bos_where_the_tokenizer_adds_it(tmp_path, adds):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Replace("▁", " ")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, add_bos_token=adds, **special)
    loaded.save_pretrained(tmp_path / "source")
    assert (loaded("a b")["input_ids"][0] == 1) is adds
    prepare_tokenizer(tmp_path / "source", tmp_path / "prepared")
    for encoder in (Encoder(tmp_path / "prepared"), open_encoder(tmp_path / "source")):
        assert (encoder.bos, encoder.eos, encoder.prefix) == ((1, 2, 1) if adds else (None, 2, 2))
        assert encoder.encode(["a b"])[0].tolist() == loaded("a b", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.path") as raised:
        load_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_pretrained_start_brings_its_own_tokenizer(tmp_path):
    start = pretrained(tmp_path / "start")
    config = start_from(start, tmp_path)
    check_tokenizer(config)
    before = input_identity(config)["corpus"]
    (start / "chat_template.jinja").write_text("x")
    assert input_identity(config)["corpus"] != before, "another tokenizer in the same place makes the corpus anew"


def test_another_tokenizer_than_the_pretrained_start_s_must_be_asked_for(trained, tmp_path):
    start = pretrained(tmp_path / "start")
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.path: .* is not the tokenizer of model\.init\.checkpoint .*replace"
    ):
        check_tokenizer(start_from(start, tmp_path, tokenizer={"path": str(trained)}))
    check_tokenizer(start_from(start, tmp_path, tokenizer={"path": str(trained), "replace": True}))
    shutil.copytree(start, tmp_path / "copy")
    check_tokenizer(start_from(start, tmp_path, tokenizer={"path": str(tmp_path / "copy")}))


def test_a_pretrained_start_without_a_tokenizer_asks_where_it_is(trained, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "config.json").write_text(json.dumps(MOE))
    with pytest.raises(
        ConfigError, match=r"^tokenizer\.path: is not set, and model\.init\.checkpoint .* no tokenizer files; name"
    ):
        check_tokenizer(start_from(start, tmp_path))
    check_tokenizer(start_from(start, tmp_path, tokenizer={"path": str(trained)}))


def test_a_vocabulary_larger_than_the_model_s_is_found_before_any_work(trained, tmp_path):
    entries = Encoder(trained).vocab_size
    small = {"config": {"vocab_size": entries - 1}}
    with pytest.raises(ConfigError, match=rf"model\.config\.vocab_size: {entries - 1}: .* set at least {entries}"):
        check_tokenizer(run_config(tmp_path, model=small, tokenizer={"path": str(trained)}))
    with pytest.raises(ConfigError, match=r"lower tokenizer\.train_vocab_size"):
        check_tokenizer(run_config(tmp_path, model=small, tokenizer={"train_vocab_size": 400}))
    check_tokenizer(run_config(tmp_path, model={"config": {"vocab_size": entries}}, tokenizer={"path": str(trained)}))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(MOE | {"vocab_size": entries - 1}))
    with pytest.raises(
        CheckpointError, match=r"model\.init\.checkpoint: .*embedding has .* rows, but the tokenizer has"
    ):
        check_tokenizer(start_from(checkpoint, tmp_path, tokenizer={"path": str(trained)}))


def test_another_tokenizer_at_the_same_path_is_not_the_old_one(trained):
    before = Encoder(trained).encode(["def f(x)"])[0].tolist()
    save_trained(train_bpe(["zz yy"] * 9, 300), trained)
    after = Encoder(trained)
    assert after.vocab_size < 300
    assert after.encode(["def f(x)"])[0].tolist() != before


def test_a_sentencepiece_model_is_read(tmp_path):
    source, text = tmp_path / "source", tmp_path / "text"
    source.mkdir()
    text.write_text("\n".join(f"the quick brown fox jumps over the lazy dog {i}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(source / "tokenizer"),
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (source / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "add_bos_token": True,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    prepare_tokenizer(source, tmp_path / "prepared")
    encoder = Encoder(tmp_path / "prepared")
    reference = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    assert (encoder.bos, encoder.eos) == (reference.bos_id(), reference.eos_id())
    for line in ("the fox", "two  spaces é漢", "a\nb"):
        assert encoder.encode([line])[0].tolist() == reference.encode(line)
    assert (tmp_path / "prepared" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
