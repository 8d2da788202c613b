"""GPUs: memory, peak speed, compute capability, links, and the share of the peak that published trainings reach (MFU).

* Memory is what torch reports (GiB), which is less than the name on the box: drivers and error correction take a part.
* Peaks are from the vendor's data sheets, for dense matrix products in bf16 with fp32 accumulation; for T4 and V100,
  which have no bf16, in fp16.
* MFU counts the operations of the model, without recomputation and with full attention (`plan.cost`), relative to that
  peak. It is the figure of a published training where `Utilisation` names one, and else a cautious assumption.
* A link is the speed at which cards of one node exchange data, each way: NVLink's where the card has it, else half of
  what its PCIe slot moves, because data between cards without peer access pass through the machine's memory.
* Power is the most that the vendor's data sheet lets the card take, without the machine around it.
"""

from __future__ import annotations

import dataclasses
import functools
import re

PEAK_FLOPS = 312e12
"""Peak speed of an A100-80GB in bf16 (data sheet), to which a pool's `speed` is relative."""
UTILISATION = 0.35
"""Share of the peak that training is assumed to reach on a pool whose card is not named."""
BF16_CAPABILITY = (8, 0)
"""Lowest compute capability that multiplies matrices in bf16."""
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
"""First branch of NVIDIA's driver that runs a major version of CUDA, from NVIDIA's table of CUDA compatibility."""


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """Share of a card's peak that training reaches (MFU).

    Attributes:
        dense: MFU of a dense model.
        moe: MFU of a model with several experts per layer.
        dense_source: Publication that measured `dense`; None: it is assumed.
        moe_source: Publication that measured `moe`; None: it is assumed.
    """

    dense: float = 0.30
    moe: float = 0.15
    dense_source: str | None = None
    moe_source: str | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: Name in configurations, cluster files and reports.
        pattern: Regular expression that finds the card in its name in CUDA or in a cluster file.
        memory_gb: Memory that torch reports (GiB).
        tflops: Peak of dense matrix products in bf16, or in fp16 where the card has no bf16 (TFLOP/s).
        tflops_fp32: Peak in fp32 without TF32 (TFLOP/s).
        capability: Compute capability in CUDA.
        link_gb_per_second: Speed between cards of one node, each way (GB/s).
        watts: Power of the card under load (W).
        mfu: Share of the peak that training reaches.
    """

    name: str
    pattern: str
    memory_gb: float
    tflops: float
    tflops_fp32: float
    capability: tuple[int, int]
    link_gb_per_second: float
    watts: float
    mfu: Utilisation = Utilisation()

    @property
    def bf16(self) -> bool:
        """Whether the card multiplies matrices in bf16."""
        return self.capability >= BF16_CAPABILITY

    def flops(self, *, moe: bool) -> float:
        """Operations per second of training a model, in the precision that `precision: auto` means on this card."""
        return (self.tflops if self.bf16 else self.tflops_fp32) * 1e12 * (self.mfu.moe if moe else self.mfu.dense)


_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md: MPT 350M to 7B with FSDP on 8 cards"
_H100 = Utilisation(
    dense=0.40,
    moe=0.24,
    dense_source=_FOUNDRY,
    moe_source=(
        "rounded mean of OLMoE (arXiv 2409.02060) 0.21, Qwen3-30B-A3B (NVIDIA Megatron Bridge 25.09) 0.30, "
        "Qwen3-235B-A22B (Megatron MoE ModelZoo) 0.28, Mixtral-8x7B (NVIDIA/Megatron-LM issue 756) 0.24, "
        "DeepSeek-V3-16B (pytorch/torchtitan issue 1789) 0.20 and gpt-oss-120B (Megatron Bridge 26.02) 0.19"
    ),
)
_A100 = Utilisation(
    dense=0.50,
    moe=0.20,
    dense_source=_FOUNDRY,
    moe_source="databricks/megablocks issue 57: 830M with 8 experts, top 2, 9,200 tokens/s per card on 4 nodes",
)
_B200 = Utilisation(
    moe=0.10, moe_source="NVIDIA Megatron Bridge 26.02: gpt-oss-120B in bf16 on 64 cards, 219 TFLOP/s per card"
)
_RTX_4090 = Utilisation(
    dense=0.50,
    dense_source="karpathy/nanoGPT issue 182: GPT-2 124M at 29 % of 312 TFLOP/s; LLMQ (arXiv 2512.15306): about 0.5",
)

_Row = tuple[str, str, float, float, float, tuple[int, int], float, float, Utilisation]
_ASSUMED = Utilisation()
_TABLE: tuple[_Row, ...] = (
    ("B200", r"B200", 178.3, 2250, 80, (10, 0), 900, 1000, _B200),
    ("H200", r"H200", 139.8, 989, 67, (9, 0), 450, 700, _H100),
    ("H100 PCIe", r"H100[ -]PCIe", 79.1, 756, 51, (9, 0), 24, 350, _H100),
    ("H100 NVL", r"H100[ -]NVL", 93.0, 835, 60, (9, 0), 24, 400, _H100),
    ("H100", r"H100", 79.1, 989, 67, (9, 0), 450, 700, _H100),
    ("A100-40GB", r"A100\b.*\b40GB", 39.4, 312, 19.5, (8, 0), 300, 400, _A100),
    ("A100-80GB", r"A100", 79.1, 312, 19.5, (8, 0), 300, 400, _A100),
    ("A800", r"A800", 79.1, 312, 19.5, (8, 0), 200, 400, _A100),
    ("L40S", r"L40S", 44.3, 362, 91.6, (8, 9), 12, 350, _ASSUMED),
    ("L40", r"L40", 44.3, 181, 90.5, (8, 9), 12, 300, _ASSUMED),
    ("L4", r"L4", 22.05, 121, 30.3, (8, 9), 12, 72, _ASSUMED),
    ("RTX 6000 Ada", r"RTX[ -]6000[ -]Ada", 47.4, 364, 91.1, (8, 9), 12, 300, _ASSUMED),
    ("A6000", r"A6000", 47.4, 155, 38.7, (8, 6), 12, 300, _ASSUMED),
    ("A40", r"A40", 44.3, 150, 37.4, (8, 6), 12, 300, _ASSUMED),
    ("A10G", r"A10G", 22.0, 70, 35, (8, 6), 12, 300, _ASSUMED),
    ("A10", r"A10", 22.0, 125, 31.2, (8, 6), 12, 150, _ASSUMED),
    ("RTX 5090", r"RTX[ -]5090", 31.3, 209, 104.8, (12, 0), 24, 575, _ASSUMED),
    ("RTX 5080", r"RTX[ -]5080", 15.5, 112, 56.3, (12, 0), 24, 360, _ASSUMED),
    ("RTX 5070 Ti", r"RTX[ -]5070[ -]Ti", 15.5, 87, 43.9, (12, 0), 24, 300, _ASSUMED),
    ("RTX 5070", r"RTX[ -]5070", 11.5, 61, 30.9, (12, 0), 24, 250, _ASSUMED),
    ("RTX 4090", r"RTX[ -]4090", 23.5, 165, 82.6, (8, 9), 12, 450, _RTX_4090),
    ("RTX 4080", r"RTX[ -]4080", 15.5, 97, 48.7, (8, 9), 12, 320, _ASSUMED),
    ("RTX 4070 Ti SUPER", r"RTX[ -]4070[ -]Ti[ -]SUPER", 15.5, 88, 44.1, (8, 9), 12, 285, _ASSUMED),
    ("RTX 4070 Ti", r"RTX[ -]4070[ -]Ti", 11.5, 80, 40.1, (8, 9), 12, 285, _ASSUMED),
    ("RTX 4070", r"RTX[ -]4070", 11.5, 58, 29.1, (8, 9), 12, 200, _ASSUMED),
    ("RTX 4060 Ti", r"RTX[ -]4060[ -]Ti", 15.5, 44, 22.1, (8, 9), 6, 165, _ASSUMED),
    ("RTX 3090", r"RTX[ -]3090", 23.5, 71, 35.6, (8, 6), 12, 350, _ASSUMED),
    ("RTX 3080", r"RTX[ -]3080", 9.6, 59, 29.8, (8, 6), 12, 320, _ASSUMED),
    ("RTX 3060", r"RTX[ -]3060", 11.6, 25, 12.7, (8, 6), 12, 170, _ASSUMED),
    ("V100-32GB", r"V100\b.*\b32GB", 31.7, 125, 15.7, (7, 0), 150, 300, _ASSUMED),
    ("V100-16GB", r"V100", 15.7, 125, 15.7, (7, 0), 150, 300, _ASSUMED),
    ("T4", r"T4", 14.56, 65, 8.1, (7, 5), 6, 70, _ASSUMED),
)
"""Rows of the table of cards, with the fields of `Card` in their order."""
CARDS: tuple[Card, ...] = tuple(Card(*row) for row in _TABLE)
"""All known cards. The first whose pattern occurs in a name is the card of that name, unless it is a variant."""


_VARIANT = re.compile(r"\b(?:Ti|SUPER|D|Laptop|Mobile|Max-?Q|MIG)\b|-\d{1,3}[ABCQ]\b", re.IGNORECASE)
"""Words next to a card's name that make it another card, with less memory or speed: a variant, a part of a card, or
NVIDIA's share of a card in a virtual machine (such as A10-24Q)."""


@functools.lru_cache(maxsize=256)  # a plan asks for the same names a thousand times
def find_card(name: str) -> Card | None:
    """The card with this name, as CUDA, a cluster file or a configuration writes it; None if it is not in the table.

    A variant without a row of its own, such as `RTX 4090 Laptop GPU`, is not in the table.
    """
    return next((card for card in CARDS if _is_card(card, name)), None)


def without_card(name: str, card: Card) -> str:
    """What stands next to the name of a card."""
    return re.sub(rf"\b{card.pattern}\b", "", name, flags=re.IGNORECASE)


def _is_card(card: Card, name: str) -> bool:
    rest = without_card(name, card)
    return rest != name and _VARIANT.search(rest) is None


def known_card(name: str) -> str:
    """The name of a card as the table writes it.

    Raises:
        ValueError: The card is not in the table.
    """
    found = find_card(name)
    if found is None:
        known = ", ".join(sorted(card.name for card in CARDS))
        raise ValueError(f"{name} is none of the known cards ({known}); leave it out, and state memory_gb and speed")
    return found.name


def peak_flops(name: str) -> float | None:
    """Peak speed of a GPU (FLOP/s), given its name in CUDA; None if the GPU is not in the table."""
    card = find_card(name)
    return None if card is None else card.tflops * 1e12
