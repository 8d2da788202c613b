"""Ask llama.cpp about a GGUF file: `python llama_cpp.py FILE`, with questions on the standard input.

llama.cpp runs on one thread with an fp32 cache, so that its results differ from those of transformers by rounding
alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

ANSWER = "ANSWER "


def ask(file: Path, questions: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Answers of llama.cpp's server to requests: (path, body)."""
    done = subprocess.run(
        [sys.executable, __file__, str(file)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix(ANSWER))


def logprobs(file: Path, prompts: list[list[int]], *, count: int) -> tuple[list[dict[int, float]], list[int]]:
    """Log-probability of every next token after each prompt, and the likeliest `count` tokens after the last prompt.

    The server reports no log-probabilities if the likeliest token ends within a character. The continuation ends before
    EOS.
    """
    common = {"temperature": 0, "cache_prompt": False}
    *answers, last = ask(
        file,
        [
            *(
                ("/completion", {"prompt": prompt, "n_predict": 1, "n_probs": 1_000_000, **common})
                for prompt in prompts
            ),
            ("/completion", {"prompt": prompts[-1], "n_predict": count, "return_tokens": True, **common}),
        ],
    )
    return [_logprobs_in(answer) for answer in answers], last["tokens"]


def _logprobs_in(answer: dict[str, Any]) -> dict[int, float]:
    steps = answer.get("completion_probabilities", [])
    return {each["id"]: each["logprob"] for step in steps for each in step["top_logprobs"]}


def encoded(file: Path, texts: list[str]) -> list[list[int]]:
    """Tokens of texts, with the special tokens that the file asks for."""
    questions = [("/tokenize", {"content": text, "add_special": True}) for text in texts]
    return [answer["tokens"] for answer in ask(file, questions)]


def _main(file: str) -> None:
    import xllamacpp  # noqa: PLC0415  # the tests' own process needs only the questions

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx, parameters.n_parallel, parameters.port = 256, 1, 0
    parameters.n_gpu_layers, parameters.warmup, parameters.verbosity = 0, False, 2
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    answers = []
    for path, body in json.load(sys.stdin):
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            answers.append(json.load(response))
    sys.stdout.write(f"{ANSWER}{json.dumps(answers)}\n")
    sys.stdout.flush()
    os._exit(0)  # the server's threads would wait for more


if __name__ == "__main__":
    _main(sys.argv[1])
