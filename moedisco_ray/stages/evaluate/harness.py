"""Evaluate a model on multiple-choice and completion tasks, with EleutherAI's lm-eval.

The harness (Gao et al., the Language Model Evaluation Harness) builds the prompts, picks the answers and computes the
accuracy. `scoring` computes the log-likelihoods, as in training: each question begins a document, after BOS if the
tokenizer adds it. Chat templates are not applied. Nothing is downloaded. This module needs the extra `lm-eval`, and is
imported only when tasks are evaluated.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moedisco_ray.core.config.task_files import Rows, read_task_file
from moedisco_ray.core.printable import progress_bars
from moedisco_ray.stages.scoring import predict_tokens

Encode = Callable[[Sequence[str]], list[NDArray[np.int32]]]


class ScoredLM(TemplateLM):
    """Adapter through which lm-eval requests log-likelihoods from a model.

    lm-eval splits each text into context and continuation by its own rules. A text longer than a window loses its
    beginning.

    Args:
        model: The model, on its device.
        encode: Encodes a text without special tokens.
        prefix: The token before each context.
        sequence_length: Maximum tokens of a context and its continuation together.
    """

    def __init__(self, model: PreTrainedModel, encode: Encode, prefix: int, sequence_length: int) -> None:
        super().__init__()
        self._model = model
        self._encode = encode
        self._prefix = prefix
        self._length = sequence_length

    @property
    def eot_token_id(self) -> int:
        """The token before each context."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text."""
        del add_special_tokens
        ids: list[int] = self._encode([string])[0].tolist()
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether greedy decoding would generate it."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # For an empty context the harness passes the prefix itself; `predict_tokens` puts it before every window
        # anyway.
        contexts = [context[1:] if context[:1] == [self._prefix] else context for _, context, _ in requests]
        joined = [context + request[2] for context, request in zip(contexts, requests, strict=True)]
        windows = [np.array(ids[-self._length :], dtype=np.int32) for ids in joined]
        predicted = predict_tokens(self._model, windows, prefix=self._prefix, sequence_length=self._length)
        starts = [max(0, len(window) - len(request[2])) for window, request in zip(windows, requests, strict=True)]
        return [
            (-float(nats_T[start:].sum()), bool(likeliest_T[start:].all()))
            for (nats_T, likeliest_T), start in zip(predicted, starts, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not supported: multiple-choice and completion tasks do not call it."""
        raise NotImplementedError

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Not supported: multiple-choice and completion tasks do not call it."""
        raise NotImplementedError


class RowsTask(ConfigurableTask):
    """An lm-eval task whose examples are in memory, in `dataset_kwargs["rows"]`."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Create the dataset from the examples in memory; the name is lm-eval's, nothing is downloaded."""
        self.dataset = {"test": Dataset.from_list((dataset_kwargs or {})["rows"])}

    def build_all_requests(self, **settings: Any) -> None:
        """Build the requests as the harness does, without its progress bar, which cannot be turned off."""
        with contextlib.redirect_stderr(io.StringIO()):
            super().build_all_requests(**settings)


def pose(name: str, rows: Rows) -> RowsTask:
    """Create the lm-eval task for a file's examples, in the form that `read_task_file` describes."""
    common = {"task": name, "test_split": "test", "num_fewshot": 0, "dataset_kwargs": {"rows": rows}}
    if "choices" in rows[0]:
        return RowsTask(
            config={
                **common,
                "output_type": "multiple_choice",
                "doc_to_text": _question,
                "doc_to_choice": "choices",
                "doc_to_target": "gold",
                "metric_list": [_mean("acc"), _mean("acc_norm")],
            }
        )
    return RowsTask(
        config={
            **common,
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": _continuation,
            "metric_list": [_mean("acc")],
        }
    )


def evaluate_tasks(
    model: PreTrainedModel,
    paths: Sequence[Path],
    encode: Encode,
    *,
    prefix: int,
    sequence_length: int,
    limit: int | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a model on task files.

    Args:
        model: The model, on its device.
        paths: Task files; see `read_task_file`.
        encode: Encodes a text without special tokens.
        prefix: The token before each question.
        sequence_length: Maximum tokens of a question and an answer together.
        limit: Maximum number of examples per file, taken from its beginning. None means all.

    Returns:
        One dictionary per file, of JSON values: `task` (the file's name without its ending), `examples` (their number),
        `acc` (share of right answers) and its standard error `acc_stderr`. Multiple-choice tasks also have `acc_norm`
        and `acc_norm_stderr`, with each choice's log-likelihood divided by its number of characters, and `chance`, the
        share of right answers to expect from random guessing. A figure is None if it does not apply to the task, and a
        standard error also if there is only one example.

    Raises:
        ConfigError: A file holds no multiple-choice or completion tasks.
    """
    posed = {path.stem: read_task_file(f"evaluation.lm_eval.{i}", path)[:limit] for i, path in enumerate(paths)}
    lm = ScoredLM(model, encode, prefix, sequence_length)
    tasks = {name: pose(name, rows) for name, rows in posed.items()}
    with progress_bars():
        found = evaluate(lm, {"tasks": tasks}, log_samples=False)
    return [_figures(name, rows, found["results"][name]) for name, rows in posed.items()]


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _question(row: Mapping[str, Any]) -> str:
    query = str(row["query"])
    return f"{query}\nAnswer:" if query.startswith("Question:") else query


def _continuation(row: Mapping[str, Any]) -> str:
    return f" {row['continuation']}"


def _figures(name: str, rows: Rows, results: Mapping[str, Any]) -> dict[str, Any]:
    figures = {
        key: float(value) if isinstance(value := results.get(f"{key},none"), float) else None
        for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    chance = float(np.mean([1 / len(row["choices"]) for row in rows])) if "choices" in rows[0] else None
    return {"task": name, "examples": len(rows), **figures, "chance": chance}
