"""Tokenizers of SentencePiece's kind in GGUF files: llama.cpp encodes text as the tokenizer does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import sentencepiece
from gguf_files import TEXT
from test_gguf_export import HARD, MARKS
from tiny_export import write_weights
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moedisco_ray.contrib.gguf.file import write_gguf
from moedisco_ray.contrib.gguf.sentencepiece import adds_space, token_scores
from moedisco_ray.core.errors import ConfigError

LANGUAGES = [
    "Größe und Äpfel, naïve café",
    "привет, мир",
    "你好世界",
    "こんにちは 世界",
    "안녕하세요",
    "שלום",
    "नमस्ते दुनिया",
    MARKS,
    "🚀🌫️ 👩\u200d👩\u200d👧",
    "a  b   c    d          e",
    "\n\n\n",
    "tabs\tand\r\nlines\n",
    "trailing  ",
    "a▁▁ ▁b",
    "<0x41> <unk",
    "x",
]
SPACED = ["  two spaces at first", " ", "", "   "]
MARK = "▁"
SPACES: dict[str, dict[str, Any]] = {
    "normalizer": {"normalizer": normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])},
    "no prefix": {"normalizer": normalizers.Replace(" ", MARK)},
    **{
        scheme: {"pre_tokenizer": pre_tokenizers.Metaspace(MARK, scheme, split=False)}
        for scheme in ("always", "first", "never")
    },
}
"""How tokenizers mark spaces."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a `tokenizer.model` of half of the languages, so that the others need bytes."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "text").write_text("\n".join([*TEXT, *HARD, *LANGUAGES[::2]] * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=560,
        model_type="bpe",
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_whitespace=False,
        character_coverage=0.999,
    )
    (directory / "tokenizer_config.json").write_text(
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
    return directory


def plain(trained: Path) -> Tokenizer:
    """The tokenizer that transformers derives from the model."""
    return Tokenizer.from_str(AutoTokenizer.from_pretrained(trained).backend_tokenizer.to_str())


def compare(tokenizer: PreTrainedTokenizerBase, directory: Path, texts: list[str]) -> list[list[int]]:
    """Check that llama.cpp encodes texts as the tokenizer does, and return the tokens."""
    tokenizer.save_pretrained(directory)
    write_weights(directory, "mixtral")
    write_gguf(directory, directory / "tiny.gguf", name="tiny")
    found = llama_cpp.encoded(directory / "tiny.gguf", texts)
    assert dict(zip(texts, found, strict=True)) == {text: tokenizer(text)["input_ids"] for text in texts}
    return found


@pytest.mark.ecosystem("Use: GGUF file in llama.cpp", "xllamacpp")
@pytest.mark.parametrize("spaces", SPACES)
def test_llama_cpp_encodes_text_as_the_tokenizer_does(spaces: str, trained: Path, tmp_path: Path) -> None:
    backend = plain(trained)
    backend.normalizer, backend.pre_tokenizer = None, None
    for name, value in SPACES[spaces].items():
        setattr(backend, name, value)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_end|>"],
    )
    texts = [*LANGUAGES, *(text for text in (*TEXT, *HARD) if not text.startswith(" "))]
    texts += [] if spaces == "first" else ["a<|im_end|>b", "<s>a</s>"]
    compare(tokenizer, tmp_path, texts if spaces in ("always", "first") else [*texts, *SPACED, *HARD])


@pytest.mark.ecosystem("Use: GGUF file in llama.cpp", "xllamacpp")
def test_the_tokens_are_those_of_sentencepiece(trained: Path, tmp_path: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(str(trained / "tokenizer.model"))
    texts = [text for text in (*LANGUAGES, *TEXT, *HARD) if not text.startswith(" ")]
    found = compare(AutoTokenizer.from_pretrained(trained), tmp_path, texts)
    assert found == [[processor.bos_id(), *processor.encode(text)] for text in texts]
    used = {token for tokens in found for token in tokens}
    assert any(processor.is_byte(token) for token in used)
    assert sum(len(processor.id_to_piece(token)) > 2 for token in used) > 50


def test_scores_order_tokens_as_sentencepiece_does(trained: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(str(trained / "tokenizer.model"))
    found = token_scores(json.loads(plain(trained).to_str()))
    own = {token: processor.get_score(processor.piece_to_id(token)) for token in found}
    assert sorted(found, key=found.__getitem__) == sorted(found, key=own.__getitem__)


def test_what_llama_cpp_would_encode_differently_is_refused(trained: Path) -> None:
    whole = plain(trained)
    whole.normalizer = normalizers.NFKC()
    with pytest.raises(
        ConfigError, match=r"^tokenizer: 'NFKC, Metaspace': changes or splits text in a way that llama\.cpp does"
    ):
        adds_space(json.loads(whole.to_str()))
    backend = json.loads(plain(trained).to_str())
    merges = backend["model"]["merges"]
    for changed, line in [
        (merges[1:], f"'{merges[0][0]} {merges[0][1]}': is no merge, but llama.cpp would merge it; use `--to hf`"),
        ([*merges, merges[0]], "'BPE': has merges in an order that llama.cpp cannot follow"),
    ]:
        with pytest.raises(ConfigError) as caught:
            token_scores({**backend, "model": {**backend["model"], "merges": changed}})
        assert line in str(caught.value)
    vocabulary = {token: number for token, number in backend["model"]["vocab"].items() if token != "<0x0A>"}
    with pytest.raises(ConfigError, match=r"is no SentencePiece tokenizer that llama\.cpp knows"):
        token_scores({**backend, "model": {**backend["model"], "vocab": vocabulary}})
