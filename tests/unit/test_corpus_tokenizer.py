from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from moedisco_ray.config import check_config
from moedisco_ray.corpus.tokenizer import Encoder, check_settings, load_tokenizer, save_tokenizer, train_bpe
from moedisco_ray.errors import CheckpointError, ConfigError

TEXTS = ["def f(x):\n    return x + 1\n", "Grüße aus Köln — 日本語 🙂", "the cat <|endoftext|> sat", "  spaces\t\n"] * 5


@pytest.fixture
def trained(tmp_path):
    save_tokenizer(train_bpe(TEXTS, 400), {}, tmp_path / "trained")
    return tmp_path / "trained"


def run_config(tmp_path, **sections):
    (tmp_path / "text.txt").write_text("text")
    return check_config({"name": "t", "corpus": {"sources": [{"path": str(tmp_path / "text.txt")}]}, **sections})


def test_trained_tokeniser_is_what_auto_tokenizer_loads(trained):
    encoder, loaded = Encoder(trained), AutoTokenizer.from_pretrained(trained)
    assert (encoder.eos, encoder.bos, encoder.pad) == (0, 0, 0)
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 0)
    assert encoder.vocab_size == len(loaded) <= 400
    for text, ids in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        assert loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
        assert 0 not in ids     # the characters of the special token, not the token
        if "<|" not in text:
            assert loaded(text, add_special_tokens=False)["input_ids"] == ids.tolist()


def test_training_again_gives_the_same_tokeniser(trained, tmp_path):
    save_tokenizer(train_bpe(iter(TEXTS), 400), {}, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (trained / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_vocabulary_and_merges_are_enough(trained, tmp_path):
    plain = tmp_path / "plain"
    plain.mkdir()
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    (plain / "vocab.json").write_text(json.dumps(model["vocab"]))
    (plain / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    save_tokenizer(*load_tokenizer(plain), tmp_path / "saved")
    again, encoder = Encoder(tmp_path / "saved"), Encoder(trained)
    assert again.eos == encoder.eos
    assert [ids.tolist() for ids in again.encode(TEXTS)] == [ids.tolist() for ids in encoder.encode(TEXTS)]


def test_its_own_special_tokens_are_kept_and_a_missing_end_is_added(tmp_path):
    word_level = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[END]": 2}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    word_level.enable_truncation(1)
    for name in ("own", "none"):
        (tmp_path / name).mkdir()
        word_level.save(str(tmp_path / name / "tokenizer.json"))
    settings = {"eos_token": {"content": "[END]"}, "chat_template": "x"}
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(settings))
    save_tokenizer(*load_tokenizer(tmp_path / "own"), tmp_path / "own-saved")
    save_tokenizer(*load_tokenizer(tmp_path / "none"), tmp_path / "none-saved")
    own, none = Encoder(tmp_path / "own-saved"), Encoder(tmp_path / "none-saved")
    assert (own.eos, own.vocab_size) == (2, 3)
    assert (none.eos, none.pad, none.vocab_size) == (3, 3, 4)
    assert none.encode(["a a a"])[0].tolist() == [1, 1, 1]
    assert AutoTokenizer.from_pretrained(tmp_path / "own-saved").chat_template == "x"
    assert AutoTokenizer.from_pretrained(tmp_path / "none-saved").eos_token == "<|endoftext|>"


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_what_is_no_tokeniser_is_told(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.path") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_vocabulary_larger_than_the_models_is_found_before_any_work(trained, tmp_path):
    entries = Encoder(trained).vocab_size
    small = {"config": {"vocab_size": entries - 1}}
    with pytest.raises(ConfigError, match=rf"model\.config\.vocab_size: {entries - 1}: .* set at least {entries}"):
        check_settings(run_config(tmp_path, model=small, tokenizer={"path": str(trained)}))
    with pytest.raises(ConfigError, match=r"lower tokenizer\.train_vocab_size"):
        check_settings(run_config(tmp_path, model=small, tokenizer={"train_vocab_size": 400}))
    fits = {"config": {"vocab_size": entries}}
    check_settings(run_config(tmp_path, model=fits, tokenizer={"path": str(trained)}))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({
        "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, "vocab_size": entries - 1}))
    own = {"init": {"checkpoint": str(checkpoint)}}
    with pytest.raises(CheckpointError, match=r"model\.init\.checkpoint: .*set tokenizer\.path to its own"):
        check_settings(run_config(
            tmp_path, model=own, tokenizer={"path": str(trained)}, tokens={"seed_share": 0},
            clusters={"vectors": "tfidf_svd"}))


def test_another_tokeniser_at_the_same_path_is_not_the_old_one(trained):
    before = Encoder(trained).encode(["def f(x)"])[0].tolist()
    save_tokenizer(train_bpe(["zz yy"] * 9, 300), {}, trained)
    after = Encoder(trained)
    assert after.vocab_size < 300
    assert after.encode(["def f(x)"])[0].tolist() != before
