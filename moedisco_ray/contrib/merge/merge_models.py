"""`moedisco merge`: make one MoE of dense fine-tunes of one base model (Branch-Train-MiX, arXiv 2403.07816).

It runs on one machine.

Expert k of every layer is the MLP of fine-tune k. The backbone is the mean of the fine-tunes' backbones, or the base
model's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import AutoConfig

from moedisco_ray.contrib.merge.calibration_texts import (
    MOST_LENGTH,
    Text,
    calibration_batches,
    held_out_losses,
    read_texts,
)
from moedisco_ray.contrib.merge.finetunes import Finetune
from moedisco_ray.core.config import Model, UpcycleInit, tokenizer_files
from moedisco_ray.core.config.start_files import start_with_weights
from moedisco_ray.core.config.start_sizes import with_start
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.store.artifacts import reporting_full_disk, write_json
from moedisco_ray.core.store.run_models import model_name
from moedisco_ray.core.store.verification import Verifier
from moedisco_ray.execution.given_models import about, dense_model
from moedisco_ray.execution.output_checks import check_new
from moedisco_ray.models import (
    ModelMap,
    config_values,
    expert_count,
    open_dense,
    random_weights,
    upcycled_config,
    write_config,
)
from moedisco_ray.models.tokenizer_directories import copy_tokenizer, difference, load_pretrained
from moedisco_ray.stages.calibration_text import Batch
from moedisco_ray.stages.export.front_matter import combined_front_matter, facts_of
from moedisco_ray.stages.export.origin import Origin, for_all_readers, tokens_of
from moedisco_ray.stages.merge.backbone import merge_weights
from moedisco_ray.stages.merge.build import write_merged
from moedisco_ray.stages.merge.calibrate import RouterSettings
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.text.pretrained import open_encoder
from moedisco_ray.stages.text.tokenizer import check_vocabulary

FREE_FIELDS = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Fields of `config.json` in which fine-tunes of one base model may differ."""

BackboneOf = Literal["mean", "base"]


def merge_models(
    models: Sequence[str],
    base: str,
    output: Path,
    *,
    texts: Sequence[str] = (),
    backbone: BackboneOf = "mean",
    experts_per_token: int = 2,
    max_tokens: int = 131_072,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write an MoE whose experts are the MLPs of dense fine-tunes.

    Routers are computed by ridge regression from the texts: a token belongs to the fine-tune whose text it is in. Each
    fine-tune gets the same number of tokens. Without texts, router rows are random. One layer of the MoE is in memory
    at a time.

    Args:
        models: The fine-tunes: Hugging Face directories, or models of the hub as `ORG/NAME` or
            `hf://ORG/NAME@REVISION`.
        base: The model that the fine-tunes started from; the MoE gets its tokenizer, generation settings, dtype and
            licence.
        output: Directory to write; it must be new or empty.
        texts: One source of text per fine-tune, in the same order; or none.
        backbone: Whether the backbone is the mean of the fine-tunes' backbones or that of the base model.
        experts_per_token: Number of experts per token.
        max_tokens: Maximum number of tokens to read from all texts together.
        device: Device that the models run on.

    Returns:
        `directory`, `family`, `models` (the fine-tunes' names), `base`, `texts`, `layers` (figures per router),
        `losses` (with texts: held-out loss in nats per token on each text and their mean `mixture`, per model; the last
        one is the MoE) and `warnings`. `merge.json` in the directory has the same figures, and the origin of each
        tensor.

    Raises:
        ConfigError: The arguments contradict each other, or there is no tokenizer for the texts.
        CheckpointError: A model cannot be read, or the models are not of one dense architecture that a family is
            related to.
        CorpusError: A text cannot be read, or is too short.
        RunDirError: The output is not empty, or cannot be written.
    """
    check_new(output)
    if len(models) < 2:
        raise ConfigError("MODEL", len(models), "is too few models; name at least two fine-tunes of one base model")
    if texts and len(texts) != len(models):
        raise ConfigError(
            "--calibration", len(texts), f"texts for {len(models)} models; name one for each, in their order"
        )
    if experts_per_token > len(models):
        raise ConfigError(
            "--experts-per-token", experts_per_token, f"exceeds the number of experts, {len(models)}; lower it"
        )
    sizes = (len(models), experts_per_token)
    places = [*(("MODEL", place) for place in models), ("--base", base)]
    starts = [dense_model(*each, experts=len(models), per_token=experts_per_token) for each in places]
    inits = [model.init for model in starts if isinstance(model.init, UpcycleInit)]
    verifier = Verifier()
    names, paths = [model_name(init.place) for init in inits], [start_with_weights(init, verifier) for init in inits]
    configs = _configs(starts, paths, *sizes)
    warnings = [*_other_tokenizers(paths)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with reporting_full_disk(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".merge-") as scratch:
        home, draft = Path(scratch), Path(scratch) / "model"
        encoder = open_encoder(paths[-1], "--base") if texts else None
        length, found = min(MOST_LENGTH, int(configs[-1]["max_position_embeddings"])), list[Text]()
        if encoder is not None:
            with about("--base"):
                check_vocabulary(encoder.vocab_size, starts[-1], "use a base model with its own tokenizer")
            length, found = read_texts(texts, paths[-1], encoder, max_tokens=max_tokens, length=length, home=home)
        batches = calibration_batches(found, length, range(len(found)))
        merged = _write(starts[-1].family_name, configs[-1], paths, backbone, batches, directory=draft, device=device)
        complete(draft, Origin(paths[-1]))
        result: dict[str, Any] = {
            "directory": str(output),
            "family": starts[-1].family_name,
            "models": names[:-1],
            "base": names[-1],
            "backbone": backbone,
            "texts": list(texts),
            "layers": merged["layers"],
        }
        if encoder is not None:
            starts.append(with_start(Model.model_validate({"init": {"checkpoint": str(draft)}})))
            rows = [
                held_out_losses(Start(model, paths[-1], length, 0, verifier), found, encoder, device)
                for model in starts
            ]
            result["losses"] = [
                {"model": name, "texts": row, "mixture": float(np.mean(row))}
                for name, row in zip([*names, "MoE"], rows, strict=True)
            ]
            warnings += _worse(result["losses"])
        else:
            warnings.append(
                "the routers are random; name one text per model with --calibration, or fine-tune the MoE before use"
            )
        result["warnings"] = warnings
        (draft / "README.md").write_text(_card(output.name, result, starts[: len(names)]), encoding="utf-8")
        write_json(draft / "merge.json", result | {name: merged[name] for name in ("weights", "tensors")})
        draft.rename(output)
    return result


def _configs(starts: Sequence[Model], paths: Sequence[Path], experts: int, per_token: int) -> list[dict[str, Any]]:
    """The `config.json` of the MoE, as each model gives it; that of the base model is last.

    Raises:
        CheckpointError: They differ in more than what a fine-tune may change.
    """
    found = [
        upcycled_config(path, model.family_name, experts, per_token) for model, path in zip(starts, paths, strict=True)
    ]
    for values, path in zip(found[:-1], paths, strict=False):
        compared = (values.keys() | found[-1].keys()) - FREE_FIELDS
        for field in sorted(compared, key=lambda field: (field != "model_type", field)):
            own, other = values.get(field), found[-1].get(field)
            if own != other:
                raise CheckpointError(
                    "MODEL", str(path), f"has {field} {own!r}, but --base has {other!r}; name fine-tunes of --base"
                )
    return found


def _other_tokenizers(paths: Sequence[Path]) -> Iterator[str]:
    *others, base = paths
    if not tokenizer_files(base):
        return
    own = load_pretrained(base, "--base")
    for path in filter(tokenizer_files, others):
        if (found := difference(load_pretrained(path, "MODEL"), own)) is not None:
            yield f"the MoE gets the tokenizer of --base, but that of {path} differs: {found}"


def _write(
    family: str,
    config: Mapping[str, Any],
    paths: Sequence[Path],
    backbone: BackboneOf,
    batches: Sequence[Batch],
    *,
    directory: Path,
    device: str,
) -> dict[str, Any]:
    names, routers, dtype = ModelMap(family), random_weights(config, 0), Origin(paths[-1]).dtype()
    *opened, base = (open_dense(path, family, expert_count(config)) for path in paths)
    submodels = [
        Finetune(
            model, model if backbone == "mean" else base, routers=routers, number=number, model_map=names, dtype=dtype
        )
        for number, model in enumerate(opened)
    ]
    start = Finetune(base, base, routers=routers, number=0, model_map=names, dtype=dtype)
    return write_merged(
        submodels,
        start,
        config,
        merge_weights("uniform", [1] * len(submodels)),
        batches,
        directory=directory,
        router=RouterSettings("ridge") if batches else None,
        device=device,
    )


def complete(directory: Path, base: Origin) -> None:
    """Add all files but weights to the directory of an MoE: the final `config.json`, and the base model's files."""
    values = config_values(AutoConfig.from_pretrained(directory, local_files_only=True))
    if tokenizer_files(base.directory):
        tokenizer = load_pretrained(base.directory, "--base")
        copy_tokenizer(base.directory, tokenizer, directory)
        values |= tokens_of(tokenizer)
    values = base.config(values)
    base.write_generation_config(values, directory)
    base.copy_licences(directory)
    write_config(directory, for_all_readers(values, base.dtype()))


def _card(name: str, result: Mapping[str, Any], starts: Sequence[Model]) -> str:
    matter = combined_front_matter(
        name,
        result["family"],
        [facts_of(start, []) for start in (starts[-1], *starts[:-1])],
        result["texts"],
        result["losses"][-1]["texts"] if "losses" in result else [],
        tags=["merge"],
    )
    experts = "\n".join(f"* expert {number}: {model}" for number, model in enumerate(result["models"]))
    means = "the mean of theirs" if result["backbone"] == "mean" else f"that of {result['base']}"
    return (
        f"{matter}\n\n# {name}\n\n`moedisco merge` made this Mixture-of-Experts model ({result['family']}) of "
        f"fine-tunes of {result['base']}. Each layer has the MLP of each fine-tune as an expert; its backbone is "
        f"{means}.\n\n{experts}\n"
    )


def _worse(losses: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    *models, moe = losses
    best = min(models, key=lambda each: each["mixture"])
    if moe["mixture"] > best["mixture"]:
        yield (
            f"on the mixture of all texts, the MoE (loss {moe['mixture']:.4f}) is worse than {best['model']} "
            f"({best['mixture']:.4f}); fine-tune it before use"
        )
