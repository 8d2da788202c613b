"""`moedisco endpoint`: the official OpenAI client gets what `generate` generates, and the experts of each token."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from tiny_export import write_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.cli.endpoint import Endpoint, create_app, listening
from moedisco_ray.cli.generation import open_model
from moedisco_ray.core.run_models import model_name
from moedisco_ray.models.hf import moe_blocks

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('an answer comes first') }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% endif %}")
POSITIONS = 8192
TOO_LONG = "context_length_exceeded"


class Served:
    """A model behind an endpoint, and its official client."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, listener: socket.socket) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=60)
        self.passes = 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1

    def greedy(self, ids: list[int], count: int) -> list[int]:
        prompt_BL = torch.tensor([ids])
        return self.model.generate(
            prompt_BL, attention_mask=torch.ones_like(prompt_BL), max_new_tokens=count, do_sample=False,
            pad_token_id=0)[0, len(ids):].tolist()

    def experts(self, ids: list[int]) -> list[dict[str, list[int]]]:
        """The experts that each token selects in one forward pass over all of them."""
        found: dict[str, torch.Tensor] = {}
        hooks = [
            block.get_submodule("experts").register_forward_pre_hook(
                lambda _, inputs, layer=layer: found.__setitem__(str(layer), inputs[1]))
            for layer, block in moe_blocks(self.model).items()]
        with torch.inference_mode():
            self.model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return [{layer: expert_TK[token].tolist() for layer, expert_TK in found.items()} for token in range(len(ids))]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Served]:
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(uvicorn.Config(
            create_app(Endpoint(model, tokenizer, "demo")), log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(model, tokenizer, listener)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    write_model(found, "qwen3_moe", max_position_embeddings=POSITIONS)
    (found / "chat_template.jinja").write_text(TEMPLATE)
    return found


@pytest.fixture(scope="module", params=["device", "disk"])
def served(directory: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from run(*open_model(directory, device="cpu", experts_on=request.param))


@pytest.mark.ecosystem("Use: OpenAI client on `moedisco endpoint`", "openai")
@pytest.mark.parametrize("way", ["chat", "completion"])
def test_the_official_client_gets_what_the_model_generates(served: Served, way: str) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 12, "temperature": 0}
    if way == "chat":
        ids = served.tokenizer("user: the fox\nassistant: ")["input_ids"]
        create = served.client.chat.completions.create
        asked["messages"] = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]}]
    else:
        ids = [served.tokenizer.eos_token_id, *served.tokenizer("def f(x):")["input_ids"]]
        create = served.client.completions.create
        asked["prompt"] = "def f(x):"
    new = served.greedy(ids, 12)
    text = served.tokenizer.decode(new, skip_special_tokens=True)
    experts = [*served.experts([*ids, *new])[len(ids):-1], None]

    whole = create(**asked)
    assert (whole.choices[0].message.content if way == "chat" else whole.choices[0].text) == text
    assert whole.choices[0].experts == experts
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(ids), 12)

    *chunks, last = create(**asked, stream=True, stream_options={"include_usage": True})
    assert last.usage == whole.usage
    pieces = [(each.choices[0].delta.content if way == "chat" else each.choices[0].text) or "" for each in chunks]
    assert "".join(pieces) == text
    assert [found for each in chunks for found in getattr(each.choices[0], "experts", [])] == experts
    assert [each.choices[0].finish_reason for each in chunks] == [*[None] * (len(chunks) - 1), "length"]
    assert sum(map(bool, pieces)) > 2      # these tokens are mostly parts of characters
    assert len({each.id for each in chunks}) == 1


def test_an_answer_that_the_model_ends_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [served.tokenizer.eos_token_id, *served.tokenizer("def f(x):")["input_ids"]]
    new = served.greedy(ids, 3)
    assert new[2] not in new[:2]
    monkeypatch.setattr(served.model.generation_config, "eos_token_id", [new[2], 0])
    answer = served.client.completions.create(model="demo", prompt="def f(x):", max_tokens=9, temperature=0)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 3)


def test_answers_to_many_at_once_are_those_to_each_alone(served: Served) -> None:
    def answer(prompt: str) -> str:
        return served.client.completions.create(model="demo", prompt=prompt, max_tokens=8, temperature=0).choices[0].text
    prompts = ["the fox", "def", "12345", "jumps over"]
    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(answer, prompts)) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(served: Served, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.model.generation_config, "eos_token_id", None)
    before = served.passes
    asked = {"model": "demo", "prompt": "the fox", "max_tokens": POSITIONS - 50, "stream": stream}
    if stream:
        with httpx.stream("POST", f"{served.url}/completions", json=asked) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/completions", json=asked, timeout=0.3)
    served.client.completions.create(model="demo", prompt="def", max_tokens=2)      # waits for the first answer's end
    assert 2 < served.passes - before < POSITIONS // 2


@pytest.mark.parametrize(("change", "status", "code", "message"), [
    ({"model": "gpt-4"}, 404, "model_not_found", "model: 'gpt-4': is not served here; ask for demo"),
    ({"max_tokens": POSITIONS}, 400, TOO_LONG, f"messages: .* and {POSITIONS} new ones exceed the model's {POSITIONS}"),
    ({"messages": [{"role": "user", "content": "fox " * POSITIONS}]}, 400, TOO_LONG, "shorten the text"),
    ({"logprobs": True}, 400, None, "logprobs: is no parameter of this endpoint"),
    ({"n": 2}, 400, None, "n: must be 1"),
    ({"temperature": -1}, 400, None, "temperature: must be at least 0"),
    ({"messages": []}, 400, None, "messages: must have at least 1 entries"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, None, "refuses these messages .an answer comes first"),
])
def test_mistakes_are_answered_in_openais_form(
    served: Served, change: dict[str, Any], status: int, code: str | None, message: str,
) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **change}
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=message) as caught:
            served.client.chat.completions.create(**asked, stream=stream)
        assert (caught.value.status_code, caught.value.code, caught.value.type) == (status, code, "invalid_request_error")


def test_paths_and_bodies_that_are_none_are_mistakes_too(served: Served) -> None:
    assert [each.id for each in served.client.models.list()] == ["demo"]
    with pytest.raises(openai.NotFoundError):
        served.client.embeddings.create(model="demo", input="x")
    answer = httpx.post(f"{served.url}/completions", content="{", headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_failure_while_it_generates_reaches_the_client(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")
    monkeypatch.setattr(served.model, "generate", fail)
    for stream in (True, False):
        with pytest.raises(openai.APIError, match="out of memory"):
            list(served.client.completions.create(model="demo", prompt="x", stream=stream))


def test_a_dense_model_without_a_template_completes_text(directory: Path) -> None:
    _, tokenizer = open_model(directory, device="cpu")
    tokenizer.chat_template = None
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    for served in run(model, tokenizer):
        choice = served.client.completions.create(model="demo", prompt="x", max_tokens=2).choices[0]
        assert not hasattr(choice, "experts")
        with pytest.raises(openai.BadRequestError, match="the model has no chat template; use /v1/completions"):
            served.client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "x"}])


def test_mistakes_on_the_command_line_are_one_line(directory: Path) -> None:
    with listening("127.0.0.1", 0) as listener:
        port = str(listener.getsockname()[1])
        for arguments, message in {
            (str(directory), "--port", port): f"--port: {port}: another program uses it; choose another",
            ("no-such-run",): "RUN_DIR: 'no-such-run': holds no finished model",
            (str(directory), "--port", "0", "--resident-experts", "2"): "--resident-experts: 2: all experts are on the device",
            (str(directory), "--port", "0", "--host", "192.0.2.1"): "--host: '192.0.2.1': cannot be listened on",
        }.items():
            result = CliRunner().invoke(app, ["endpoint", *arguments])
            assert result.exit_code == 2
            assert result.stderr.startswith(f"moedisco: {message}")
            assert result.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_it_while_it_answers(directory: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "moedisco_ray", "endpoint", str(directory), "--port", "0", "--experts-on", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.fullmatch(rf"(http://127\.0\.0\.1:\d+/v1) has the model {directory.name}; Ctrl-C ends it\n", line)
        assert url is not None
        asked = {"model": directory.name, "prompt": "x", "max_tokens": POSITIONS - 50, "temperature": 2, "stream": True}
        with httpx.stream("POST", f"{url[1]}/completions", json=asked, timeout=60) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0


@pytest.mark.parametrize(("place", "name"), [
    ("s3://bucket/runs/demo/model", "demo"), ("s3://bucket/runs/demo", "demo"), ("hf://ORG/NAME@main", "ORG/NAME"),
    (Path("runs/demo"), "demo"), (Path("weights.gguf"), "weights")])
def test_a_model_has_the_name_of_its_run(place: str | Path, name: str) -> None:
    assert model_name(place) == name
