"""The page with the supported families, from their declarations."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from moedisco_ray.core import families
from moedisco_ray.core.families import REFUSED, Router

HEAD = ["`model.family`", "models", "router", "dense starts", "GGUF"]
REFUSED_HEAD = ["`model_type`", "not supported, because"]
SUBMODELS = """\
A sub-model has a share of each layer's experts. The rows of its router are those of its experts, and the whole backbone
is its own. Its router cannot keep these settings of the whole model:

* `num_experts_per_tok` is at most the number of the sub-model's experts.
* Where experts are selected from the best groups, `topk_group` is at most the number of the sub-model's groups. A
  sub-model with a part of one group has no limit. `clusters.count` must give whole groups or equal parts of a group.
* Where the weights of a softmax are not normalised, they are larger than in the whole model, because the softmax covers
  fewer experts. The merge rescales the experts.

Two routers are unlike the others:

* A router of two layers (`llama_moe`): the first layer belongs to the backbone. Where sub-models have one expert each,
  the merge computes both layers.
* SparseMixer (`phimoe`): in transformers it samples experts during training. Here it selects them as at inference, so
  that a training can be repeated and resumed exactly. The only expert of a sub-model has the weight 1; the weights of
  the two experts of the whole model sum to up to 2, and the merge rescales the experts."""

RECURRENT = """\
Most layers of `qwen3_next` and `qwen3_5_moe_text` have a recurrent state (Gated DeltaNet, arXiv 2412.06464) in place of
attention; every `full_attention_interval`-th layer has attention.

* transformers computes the recurrence with plain operations of torch, or with the kernels of `flash-linear-attention`
  and `causal-conv1d` where they are installed. Memory is planned for the plain operations, which need more. Planned
  times assume the utilisation of other models, which has not been measured for recurrences; `--measured` takes the
  speed from a run.
* `optimizer.within_documents` is refused, because the state carries over from one document to the next.
  So it does from one conversation of a sequence to the next.
* A checkpoint of `qwen3_5_moe`, which reads images too, is a start of `qwen3_5_moe_text`, and one of `qwen3_5` a dense
  start. The part for images is left out, so the finished model reads text only. The same holds for Qwen3-VL
  (`qwen3_vl_moe`, `qwen3_vl`), whose part for text is a `qwen3_moe` or a `qwen3`.
* transformers reads every tokenizer next to a model of `qwen3_5_moe_text` as that of Qwen3.5, so `tokenizer.path` must
  name one of these, unless the start has one.
* Layers that predict further tokens are left out. llama.cpp needs heads of keys and of values of one size
  (`linear_key_head_dim`, `linear_value_head_dim`). A GGUF file of `qwen3_5_moe_text` can be a start; transformers reads
  none of `qwen3_next`."""

QUANTISED = """\
Two kinds of checkpoints with quantised weights are starts: the 4 bits of gpt-oss (`mxfp4`), and fp8 with a scale per
block, as of DeepSeek-V3, or per tensor (`fp8`). Each tensor is dequantised to bf16 when it is read, and no
copy is written. The finished model is stored in bf16, without `quantization_config`. Other quantisations, such as
`gptq`, `awq`, `bitsandbytes` and `compressed-tensors`, are refused."""


def rows() -> Iterator[list[str]]:
    """A row per family of this package."""
    for page in families.PAGES:
        first = inspect.cleandoc(page.__doc__ or "").split(". ")[0].split("\n\n")[0].rstrip(".")
        family = page.FAMILY
        starts = ", ".join(f"`{kind}`" for kind in family.dense) or "none"
        in_gguf = "none" if family.gguf is None else f"`{family.gguf.architecture}`"
        yield [f"`{family.name}`", first, _router(family.router), starts, in_gguf]


def refused() -> list[list[str]]:
    """A row per family that is not supported."""
    return [[f"`{name}`", reason] for name, reason in REFUSED.items()]


def _router(router: Router) -> str:
    weights = {
        "always": "normalised weights",
        "never": "weights not normalised",
        "by_setting": "weights normalised by `norm_topk_prob`",
    }
    scores = "SparseMixer" if router.scores == "sparse_mixer" else router.scores
    parts = [*(["two layers"] if router.hidden else []), scores, weights[router.normalises]]
    if router.limits_groups:
        parts.append(
            "groups of experts" if router.limit_field is None else f"groups of experts by `{router.limit_field[0]}`"
        )
    return ", ".join([*parts, *(["bias for the selection"] if router.correction else [])])
