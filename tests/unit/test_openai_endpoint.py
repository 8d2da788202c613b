"""`transformers serve` with our export is an OpenAI-compatible endpoint, as the documents say."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from tiny_export import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\\n' }}")     # a line break at the end of a template itself is dropped
START_SECONDS = 250
"""Time for the import of torch on a busy machine (s)."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    write_model(found, "qwen3_moe")
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture(scope="module")
def client(directory: Path) -> Iterator[openai.OpenAI]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    server = subprocess.Popen([program, "serve", str(directory), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"])
    end = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < end:
            try:
                httpx.get(f"http://127.0.0.1:{port}/health").raise_for_status()
                break
            except httpx.HTTPError:
                assert server.poll() is None
                time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.kill()
        server.wait()


def greedy(directory: Path, text: str, count: int) -> str:
    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)["input_ids"]
    found = model.generate(ids, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(found[0, ids.shape[1]:], skip_special_tokens=True)


def same(found: str, expected: str) -> bool:
    """Whether two texts agree, but for space and half a character at the ends, which a stream leaves out."""
    return found.strip("\ufffd \n") == expected.strip("\ufffd \n")


@pytest.mark.timeout(300)
def test_the_official_client_gets_what_the_model_generates(client: openai.OpenAI, directory: Path) -> None:
    model = str(directory)
    assert model in [each.id for each in client.models.list()]
    expected = greedy(directory, "def f(x):", 12)
    asked = {"model": model, "max_tokens": 12, "temperature": 0}
    assert client.completions.create(prompt="def f(x):", **asked).choices[0].text == expected
    pieces = [event.choices[0].text for event in client.completions.create(prompt="def f(x):", stream=True, **asked)]
    assert same("".join(pieces), expected)
    assert len(pieces) > 2
    # Of Qwen's families, transformers takes as the answer what follows `<|im_start|>assistant`.
    messages = [{"role": "user", "content": "the fox"}]
    expected = greedy(directory, "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n", 12)
    assert same(client.chat.completions.create(messages=messages, **asked).choices[0].message.content, expected)
    pieces = [event.choices[0].delta.content or "" for event in client.chat.completions.create(
        messages=messages, stream=True, **asked)]
    assert same("".join(pieces), expected)
    assert len(pieces) > 2
