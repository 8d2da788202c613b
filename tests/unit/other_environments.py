"""Continue texts with exported models in another environment's program: `python other_environments.py PROGRAM`.

`make test-ecosystem` makes these environments. A variable such as MOEDISCO_TEST_VLLM names the interpreter of another
one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ANSWER = "ANSWER "
ENVIRONMENTS = Path(__file__).resolve().parents[2] / "build" / "environments"
SECONDS = 840
"""Time for a program to start and to answer (s)."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A program in an environment of its own.

    Attributes:
        package: Package that the program is of.
        folder: Folder of its environment in `ENVIRONMENTS`.
        variable: Environment variable that names an interpreter instead.
    """

    package: str
    folder: str
    variable: str

    @property
    def python(self) -> Path | None:
        """The interpreter; None if the environment does not exist."""
        found = Path(os.environ.get(self.variable) or ENVIRONMENTS / self.folder / "bin" / "python")
        return found if found.is_file() else None

    def command(self, name: str) -> Path:
        """A command of the program."""
        assert self.python is not None
        return self.python.with_name(name)

    def version(self, distribution: str) -> str:
        """A distribution in the environment, with its version."""
        asked = f"import importlib.metadata; print(importlib.metadata.version({distribution!r}))"
        found = subprocess.run(
            [self.python, "-c", asked], capture_output=True, text=True, check=True, env=without_ours()
        )
        return f"{distribution} {found.stdout.strip()}"

    @property
    def missing(self) -> str:
        """Why a test is skipped."""
        return f"{self.folder} is not installed, and {self.variable} names no interpreter"

    def continuations(self, models: list[Path], text: str, count: int) -> dict[str, Any]:
        """The program's `version`; per model, the `ids` of a text and the likeliest next `tokens`, or an `error`."""
        asked = {"models": [str(model) for model in models], "text": text, "count": count}
        done = subprocess.run(
            [self.python, __file__, self.package],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            env=without_ours(HF_HUB_OFFLINE="1"),
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
        assert lines, done.stderr[-5000:]
        return json.loads(lines[-1].removeprefix(ANSWER))


def without_ours(**variables: str) -> dict[str, str]:
    """The environment variables of a process in another environment of Python."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")} | variables


TRANSFORMERS_4 = Program("transformers", "transformers-4.57", "MOEDISCO_TEST_TRANSFORMERS_4")
VLLM = Program("vllm", "vllm", "MOEDISCO_TEST_VLLM")
MERGEKIT = Program("mergekit", "mergekit", "MOEDISCO_TEST_MERGEKIT")


def _transformers(models: list[str], text: str, count: int) -> dict[str, Any]:
    import torch  # noqa: PLC0415  # the tests' own process needs only the questions
    import transformers  # noqa: PLC0415

    torch.set_num_threads(1)
    found = []
    for directory in models:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(directory)
        except ValueError as error:
            found.append({"error": str(error)})
            continue
        ids = transformers.AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
        tokens = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()
        found.append({"ids": ids, "tokens": tokens, "dtype": str(model.dtype)})
    return {"version": f"transformers {transformers.__version__}", "found": found}


def _vllm(models: list[str], text: str, count: int) -> dict[str, Any]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    import vllm  # noqa: PLC0415
    from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415

    def answer(directory: str) -> dict[str, Any]:
        # A compiled model, vLLM's default, takes longer. Like it, this one rotates with torch: on a CPU, vLLM 0.32's
        # own kernel takes the distance between heads for that between tokens, which is wrong for latent attention. On a
        # processor with AMX, latent attention takes fp32 only without AMX; other attention ignores the backend.
        llm = vllm.LLM(
            directory,
            dtype=json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["dtype"],
            enforce_eager=True,
            compilation_config={"custom_ops": ["-rotary_embedding"]},
            attention_backend="CPU_MLA",
            disable_log_stats=True,
        )
        ids = llm.get_tokenizer()(text)["input_ids"]
        (answer,) = llm.generate(
            [{"prompt_token_ids": ids}], vllm.SamplingParams(temperature=0, max_tokens=count), use_tqdm=False
        )
        return {"ids": ids, "tokens": list(answer.outputs[0].token_ids)}

    found = []
    for directory in models:
        try:
            found.append(answer(directory))
        except (AssertionError, AttributeError, KeyError, RuntimeError, ValueError) as error:
            found.append({"error": repr(error)})
        cleanup_dist_env_and_memory()  # after the end of its LLM, which would end the next one's process groups
    return {"version": f"vllm {vllm.__version__}", "found": found}


if __name__ == "__main__":
    answer = {"transformers": _transformers, "vllm": _vllm}[sys.argv[1]](**json.load(sys.stdin))
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")
    sys.stdout.flush()
    os._exit(0)  # threads of the engine would wait for more
