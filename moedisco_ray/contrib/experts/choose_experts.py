"""`moedisco experts`: write an MoE with some experts of a model, with experts of other models, or both."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moedisco_ray.contrib.experts.calibrate import calibrated_experts
from moedisco_ray.contrib.experts.chosen_experts import Chosen, config_with_experts, with_experts
from moedisco_ray.contrib.merge.calibration_texts import (
    MOST_LENGTH,
    Text,
    calibration_batches,
    held_out_losses,
    read_texts,
)
from moedisco_ray.contrib.merge.merge_models import FREE_FIELDS, complete
from moedisco_ray.core.config import EXPERT_COUNTS, Model
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError, CorpusError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.records.finished_models import finished_model
from moedisco_ray.core.store.artifacts import reporting_full_disk, write_json
from moedisco_ray.core.store.locations import parent
from moedisco_ray.execution.output_checks import check_new
from moedisco_ray.models import (
    Checkpoint,
    OneExpert,
    expert_count,
    from_values,
    open_complete,
    open_dense,
    read_config,
    upcycled_config,
    write_checkpoint,
    write_config,
)
from moedisco_ray.stages.calibration_text import Batch
from moedisco_ray.stages.export.front_matter import combined_front_matter, facts_of
from moedisco_ray.stages.export.origin import Origin
from moedisco_ray.stages.scoring import default_dtype
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.text.pretrained import open_encoder
from moedisco_ray.stages.text.tokenizer import Encoder

_MOST_WORSE = 0.01
"""Share by which the perplexity on text that the model knows may increase without a warning."""
GENERAL = "embedded"
"""General text, on which both models are compared too: that of the package."""
_TRAINING_FIELDS = {"router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "rope_theta", "rope_scaling"}
"""Further fields that may differ: they matter in training alone, or `rope_parameters` holds them too."""


def choose_experts(
    model: str,
    experts: Sequence[str],
    output: Path,
    *,
    top_k: int | None = None,
    own_texts: Sequence[str] = (),
    texts: Sequence[str] = (),
    max_tokens: int = 131_072,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write an MoE that has the backbone of a model, and the chosen experts with their router rows, in this order.

    With own texts, both models are compared on documents of them, and on general text. With texts, the router rows of
    experts of other models are computed from all texts, and if experts of the model are left out or a token has fewer,
    the others are refitted (see `refit`). The model's own experts keep their rows.

    Args:
        model: Directory or URI of a finished run, or the directory of an exported model.
        experts: Numbers of experts, such as `0,2-5`; of another model as `RUN_DIR:0,2-5`. The other model must have the
            same architecture, but for the number of experts; it may also be a dense model, whose expert 0 is its MLP.
        output: Directory to write; it must be new or empty.
        top_k: Experts per token; None: as in the model, but at most all experts.
        own_texts: Sources of text that the model knows, such as one for each of its domains.
        texts: One source of text for each expert of another model, in their order; without such experts, further own
            texts, from which experts are refitted.
        max_tokens: Maximum number of tokens to read from all texts together.
        device: Device that the models run on.

    Returns:
        `directory`, `family`, `top_k`, and `experts`: model and number of each expert. With own texts also `texts`,
        `shares` (the part of each text, or of its first 256 million characters, that was read), `layers` (figures of
        each router or refit), `losses` (of the model and of the new one: the loss in nats per token on the held-out
        documents of each text, `perplexity` of each, and the mean loss `mixture`) and `warnings`.

    Raises:
        ConfigError: There is no such expert, the router cannot have this number of experts or this top-k, or texts are
            missing.
        CheckpointError: A model cannot be read, or the models have different architectures.
        CorpusError: A text cannot be read, or is too short.
        RunDirError: A location holds no model, or the output is not empty or cannot be written.
    """
    check_new(output)
    start = finished_model(model)
    first, _ = open_complete(start)
    # By directory, since a path has several spellings.
    opened, chosen = {start.resolve(): _Opened(model, first, first.config)}, list[Chosen]()
    for text in experts:
        place, _, numbers = text.rpartition(":")
        found = (finished_model(place) if place else start).resolve()
        if found not in opened:
            opened[found] = _open(place, found, first)
        index = list(opened).index(found)
        chosen += [Chosen(index, number) for number in _numbers(text, numbers, expert_count(opened[found].config))]
    names = [each.name for each in opened.values()]
    for other in opened.values():
        _check_alike(first.config, other.config, other.name)
    new = [number for number, each in enumerate(chosen) if each.model > 0]
    has_dense = any(isinstance(each.tensors, OneExpert) for each in opened.values())
    values, family = config_with_experts(first.config, len(chosen), top_k), first.model_map.family
    whole = first if _is_smaller(first, chosen, values) else None
    without_rows = "a dense model has no router" if has_dense else None
    if new and family.router.hidden is not None:
        without_rows = "rows of another model do not fit the first layer of RUN_DIR's router"
    _check_texts(own_texts, texts, new, without_rows=without_rows, is_smaller=whole is not None)
    if texts and len(new) == len(chosen):
        raise ConfigError(
            "EXPERTS", len(new), "all are of other models, but rows are computed from known ones; name one of RUN_DIR"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with reporting_full_disk(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".experts-") as scratch:
        draft = Path(scratch) / "model"
        tensors = with_experts([each.tensors for each in opened.values()], first.model_map, chosen)
        layers, measure = list[dict[str, Any]](), None
        if own_texts or texts:
            own = own_texts if new else [*own_texts, *texts]
            measure = _Comparison.of(
                own, texts if new else [], start, first.config, max_tokens, home=Path(scratch), device=device
            )
        if texts and measure is not None:
            tensors = calibrated_experts(
                tensors,
                values,
                measure.batches,
                new=new,
                whole=whole,
                report=layers,
                device=device,
                dtype=default_dtype(device),
            )
        write_checkpoint(draft, tensors, values)
        complete(draft, Origin(start))
        # `complete` takes the model's own numbers.
        write_config(draft, config_with_experts(read_config(draft), len(chosen), top_k))
        result: dict[str, Any] = {
            "directory": str(output),
            "family": family.name,
            "top_k": values[family.router.top_k_field],
            "experts": [{"model": names[each.model], "expert": each.expert} for each in chosen],
        }
        if measure is not None:
            result |= {
                "texts": [*own_texts, *texts, GENERAL],
                "shares": [text.share for text in measure.texts],
                "layers": layers,
                **measure.losses([(model, start), (output.name, draft)]),
            }
        write_json(draft / "experts.json", result)
        (draft / "README.md").write_text(
            _card(output.name, model, result, [start, *map(finished_model, names[1:])]), encoding="utf-8"
        )
        draft.rename(output)
    return result


class _Opened(NamedTuple):
    """Name of a model, its canonical tensors, and its `config.json`."""

    name: str
    tensors: Checkpoint | OneExpert
    config: Mapping[str, Any]


def _open(name: str, directory: Path, first: Checkpoint) -> _Opened:
    family = first.model_map.family
    if read_config(directory).get("model_type") in family.dense:
        # The router's first layer is that of the first model.
        units = family.router.kept_fields(first.config, expert_count(first.config))
        tensors = open_dense(directory, family.name, next(iter(units.values()), 1))
        return _Opened(name, tensors, upcycled_config(directory, family.name, 1, 1) | units)
    found, _ = open_complete(directory)
    return _Opened(name, found, found.config)


def _is_smaller(model: Checkpoint, chosen: Sequence[Chosen], values: Mapping[str, Any]) -> bool:
    """Whether the chosen experts lack some of the model's own, or a token has fewer of them."""
    count, top_k = expert_count(model.config), model.model_map.family.router.top_k_field
    kept = {each.expert for each in chosen if each.model == 0}
    return len(kept) < count or values[top_k] < config_with_experts(model.config, count, None)[top_k]


def _check_texts(
    own: Sequence[str], texts: Sequence[str], new: Sequence[int], *, without_rows: str | None, is_smaller: bool
) -> None:
    if without_rows is not None and not texts:
        raise ConfigError(
            "--calibration", None, f"{without_rows}; name a text of each new expert, from which its row is computed"
        )
    if texts and not new and not is_smaller:
        raise ConfigError(
            "--calibration",
            None,
            "there is nothing to compute, because the model keeps all experts and their number per token; "
            "name --own-text to measure it",
        )
    if texts and new and len(texts) != len(new):
        raise ConfigError(
            "--calibration",
            len(texts),
            f"texts for {len(new)} experts of other models; name one for each, in their order",
        )
    if texts and new and not own:
        raise ConfigError(
            "--own-text", None, "rows are computed from text that the model knows, and from --calibration; name both"
        )


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Texts from which router rows are computed, and on which models are compared.

    Attributes:
        own: Sources that the model knows; they are the first of `texts`.
        others: Sources of the new experts, one for each; they are the last of `texts`.
        texts: All texts, and general text as the last.
        batches: Calibration data: cluster 0 is all own text, and each other text is one cluster.
        encoder: Encoder of the tokenizer.
        tokenizer: Its directory.
        length: Tokens of a window.
        device: Device that the models run on.
    """

    own: Sequence[str]
    others: Sequence[str]
    texts: Sequence[Text]
    batches: Sequence[Batch]
    encoder: Encoder
    tokenizer: Path
    length: int
    device: str

    @classmethod
    def of(
        cls,
        own: Sequence[str],
        others: Sequence[str],
        tokenizer: Path,
        config: Mapping[str, Any],
        max_tokens: int,
        *,
        home: Path,
        device: str,
    ) -> _Comparison:
        """Read the texts with the tokenizer of a model, whose `config.json` limits the length of a window."""
        encoder, longest = open_encoder(tokenizer, "RUN_DIR"), min(MOST_LENGTH, int(config["max_position_embeddings"]))
        try:
            length, found = read_texts(
                [*own, *others, GENERAL], tokenizer, encoder, max_tokens=max_tokens, length=longest, home=home
            )
        except CorpusError as error:
            raise CorpusError("--own-text" if error.value in own else error.field, error.value, error.remedy) from error
        batches = calibration_batches(found[:-1], length, [*(0 for _ in own), *range(1, len(others) + 1)])
        return cls(
            own=own,
            others=others,
            texts=found,
            batches=batches,
            encoder=encoder,
            tokenizer=tokenizer,
            length=length,
            device=device,
        )

    def losses(self, models: Sequence[tuple[str, Path]]) -> dict[str, Any]:
        """The `losses` of two named models, and `warnings` if the second is worse on known text or no better on new."""
        found = list[dict[str, Any]]()
        for name, directory in models:
            start = Start(
                with_start(Model.model_validate({"init": {"checkpoint": str(directory)}})),
                self.tokenizer,
                self.length,
                0,
            )
            row = held_out_losses(start, self.texts, self.encoder, self.device)
            found.append(
                {"model": name, "texts": row, "perplexity": list(map(math.exp, row)), "mixture": float(np.mean(row))}
            )
        return {"losses": found, "warnings": list(self._warnings(*(each["perplexity"] for each in found)))}

    def _warnings(self, before: Sequence[float], after: Sequence[float]) -> Iterator[str]:
        known = len(self.own)
        kept = [*self.own, "general text"]
        for text, old, new in zip(kept, [*before[:known], before[-1]], [*after[:known], after[-1]], strict=True):
            if new > (1 + _MOST_WORSE) * old:
                yield (
                    f"on {text}, the held-out perplexity is {new:.4g}, {new / old - 1:.1%} above that of the model; "
                    "fine-tune the result"
                )
        for text, old, new in zip(self.others, before[known:-1], after[known:-1], strict=True):
            if new >= old:
                yield (
                    f"on {text}, the held-out perplexity is {new:.4g} with the new expert, and {old:.4g} without it; "
                    "train the expert longer, or leave it out"
                )


def _numbers(text: str, numbers: str, count: int) -> Iterator[int]:
    """The numbers that a text such as `0,2-5` names, in its order."""
    for part in numbers.split(","):
        begin, dash, end = part.partition("-")
        if not (begin.isdecimal() and (end.isdecimal() if dash else True)):
            raise ConfigError(
                "EXPERTS", text, "is no list of experts; write 0,2-5, or RUN_DIR:0,2-5 for those of another model"
            )
        first, last = int(begin), int(end or begin)
        if last < first:
            raise ConfigError(
                "EXPERTS", text, f"has the range {part}, which ends before it begins; write {last}-{first}"
            )
        if last >= count:
            raise ConfigError("EXPERTS", text, f"names an expert that is not there; choose from 0 to {count - 1}")
        yield from range(first, last + 1)


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], name: str) -> None:
    """Refuse a model of another architecture; the number of experts may differ.

    Raises:
        CheckpointError: A field of the configuration differs.
    """
    family = DECLARATIONS[first["model_type"]]
    mine, others = (from_values(config).to_dict() for config in (first, other))  # with the defaults of missing fields
    counts = {
        *EXPERT_COUNTS,
        family.num_experts_field,
        family.router.top_k_field,
        "experts_per_token",
        family.summed_size_field,
    }
    free = (FREE_FIELDS | _TRAINING_FIELDS | counts) - {family.router.jitter_field}
    # not said by all models that have its only value
    for key in family.constants.keys() & (mine.keys() ^ others.keys()):
        mine[key] = others[key] = family.constants[key]
    for field in sorted((mine.keys() | others.keys()) - free, key=lambda field: (field != "model_type", field)):
        own, theirs = mine.get(field), others.get(field)
        if own != theirs:
            raise CheckpointError(
                "EXPERTS", name, f"has {field} {theirs!r}, but RUN_DIR has {own!r}; take experts of a model like it"
            )


def _card(name: str, model: str, result: Mapping[str, Any], starts: Sequence[Path]) -> str:
    before, after = result.get("losses", [{"texts": [], "perplexity": []}] * 2)
    texts = result.get("texts", [])
    facts = [facts_of(Model.model_validate({"init": {"checkpoint": str(each)}}), []) for each in starts]
    matter = combined_front_matter(name, result["family"], facts, texts, after["texts"])
    made = {
        "scale": "Router rows of experts of other models were computed from text. ",
        "error": "The model's own experts were refitted on text, because it lacks some or a token has fewer. ",
    }
    computed = "".join(text for figure, text in made.items() if figure in next(iter(result.get("layers", ())), {}))
    measured = [
        f"* perplexity on documents of {parent(text)[1]}: {new:.4g}, and {old:.4g} of {model}"
        for text, old, new in zip(texts, before["perplexity"], after["perplexity"], strict=True)
    ]
    lines = [f"* expert {number}: {each['expert']} of {each['model']}" for number, each in enumerate(result["experts"])]
    return (
        f"{matter}\n\n# {name}\n\n`moedisco experts` made this Mixture-of-Experts model ({result['family']}, top-"
        f"{result['top_k']}) from {model}. {computed}"
        + ("" if measured else "Measure it before use.")
        + "\n\n"
        + "\n".join(lines + measured)
        + "\n"
    )
