"""The commented example configurations of the package."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

from moedisco_ray.core.cards import CARDS, find_card, without_card
from moedisco_ray.core.config.pool import MOST_WORKERS
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.limits import MOST_READINGS

PresetName = Literal["demo", "paper", "default"]
_SEEN_BY_TORCH = 0.97
"""Share of the memory that a driver states which torch sees, of cards that are not in the table."""
_LOW_MEMORY = re.compile(r"^  low_memory: .*$", re.MULTILINE)
_HIGH_MEMORY = re.compile(r"^  (high_memory: .*)$", re.MULTILINE)
_SOURCES = re.compile(r"^    - \{path: embedded\}.*$", re.MULTILINE)
_SHAPE = re.compile(r"^  family: .*?(?=^  (?:# )?init)", re.MULTILINE | re.DOTALL)
_INIT = re.compile(r"^  init: random$", re.MULTILINE)
_SEED_SHARE = re.compile(r"^(  seed_share: )[\d.]+", re.MULTILINE)
_TOTAL = re.compile(r"^(  total: )[\d_]+", re.MULTILINE)
_FEWEST = 100
"""Ratio of a preset's tokens to the fewest that it trains on."""
_NUMBER_OF_CARDS = re.compile(r"(?:(\d+) *x *)?(\S.*)")
_RTX = re.compile(r"(?:\bRTX[ -]?|^)(?=\d{4})", re.IGNORECASE)
_NEXT_TO_A_CARD = re.compile(
    r"(?:NVIDIA|GeForce|RTX|Tesla|Quadro|Generation|SXM\d?|HBM\d\w?|PCIe|GPUs?|\d+ ?Gi?B|[\s-])*", re.IGNORECASE
)
"""What may stand next to the name of a card."""
_SIZE = re.compile(r"(\d+) ?Gi?B", re.IGNORECASE)
_SEEN = 0.88
"""Smallest share of the size on a card's box that torch sees."""
_FINETUNE_POOL = re.compile(r"^(  pool: )high_memory ", re.MULTILINE)


def preset_text(name: PresetName) -> str:
    """The YAML text of a preset, comments included."""
    return (files("moedisco_ray.core.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class LocalCard:
    """A GPU of this machine.

    Attributes:
        name: Product name, as the driver states it.
        memory_gb: Memory that the driver states (GiB); torch sees about 2 % less.
    """

    name: str
    memory_gb: float

    @property
    def usable_gb(self) -> float:
        """Memory that torch sees (GiB): that of the table of cards, or less if the driver states less."""
        known, stated = find_card(self.name), math.floor(10 * _SEEN_BY_TORCH * self.memory_gb) / 10
        return (
            stated if known is None else min(known.memory_gb, stated if self.memory_gb < known.memory_gb else math.inf)
        )


def named_cards(words: str) -> tuple[LocalCard, ...]:
    """The cards that words such as `8 x RTX 4090` name.

    Raises:
        ConfigError: The words name no known card, or too many.
    """
    found = _NUMBER_OF_CARDS.fullmatch(words.strip())
    name = "" if found is None else _RTX.sub("RTX ", found[2])
    card = find_card(name)
    rest = "" if card is None else without_card(name, card)
    if card is not None and _NEXT_TO_A_CARD.fullmatch(rest) is None:
        raise ConfigError("--cards", words, f"must be cards of one kind alone, such as `8 x {card.name}`")
    stated = _SIZE.search(rest)
    if card is not None and stated is not None and not _SEEN * float(stated[1]) < card.memory_gb <= float(stated[1]):
        remedy = f"{card.name} is known with {card.memory_gb} GiB; leave the size out, and set memory_gb in the file"
        raise ConfigError("--cards", words, remedy)
    count = 1 if found is None or found[1] is None else int(found[1])
    if card is None or not 0 < count <= MOST_WORKERS:
        known = ", ".join(each.name for each in CARDS)
        raise ConfigError("--cards", words, f"must be a card, such as `8 x RTX 4090`; known are {known}")
    return (LocalCard(card.name, card.memory_gb),) * count


def tokens_for(text_tokens: int, usual: int) -> int:
    """Number of tokens to train on: no more than the text can give with use, and no more than the preset's.

    They are a hundredth of the preset's tokens at least, so that every phase has its steps; of tiny text, that reads it
    more often than is of use.

    Args:
        text_tokens: Number of tokens of the text.
        usual: Number of tokens that the preset trains on.
    """
    return min(usual, max(usual // _FEWEST, MOST_READINGS * text_tokens))


def on_text(text: str, places: Sequence[str], total: int | None = None) -> str:
    """The text of a preset with other sources of text.

    Args:
        text: Text of the preset.
        places: Files, folders, globs or URIs.
        total: Number of tokens to train on; None: those of the preset.
    """
    sources = "\n".join(f"    - {{path: {json.dumps(place, ensure_ascii=False)}}}" for place in places)
    text = _SOURCES.sub(lambda _: sources, text)
    return text if total is None else _TOTAL.sub(rf"\g<1>{total:_}", text)


def from_model(text: str, place: str, *, moe: bool) -> str:
    """The text of a preset whose run starts from a model, whose sizes replace those of the preset.

    Args:
        text: Text of the preset.
        place: A directory in Hugging Face format, or a name of the hub.
        moe: Whether it is a Mixture-of-Experts model, which needs no seed; otherwise it is upcycled.
    """
    name = json.dumps(place, ensure_ascii=False)
    init = f"{{checkpoint: {name}}}" if moe else f"{{upcycle: {name}, num_experts: 8}}"
    text = _INIT.sub(lambda _: f"  init: {init}", _SHAPE.sub("", text))
    return _SEED_SHARE.sub(r"\g<1>0", text) if moe else text


def on_own_cards(text: str, cards: Sequence[LocalCard], host_memory_gb: float | None) -> str:
    """The text of the preset `default` with the cards of one machine as its only pool.

    Where they differ, all count as the smallest one.

    Args:
        text: Text of the preset.
        cards: The machine's cards, at least one.
        host_memory_gb: The machine's main memory (GiB); None if unknown.
    """
    least = min(cards, key=lambda card: card.usable_gb)
    known, count = find_card(least.name), len(cards)
    settings: dict[str, object] = {"resource": "low_mem_gpu", "gpu": 1}
    if known is not None:
        settings["card"] = known.name
    if known is None or least.usable_gb < known.memory_gb:
        settings["memory_gb"] = least.usable_gb
    settings |= {"price_per_hour": 0, "max_workers": count, "gpus_per_node": count, "network": 10}
    settings["host_memory_gb"] = "null" if host_memory_gb is None else math.floor(host_memory_gb)
    pool = ", ".join(f"{name}: {value}" for name, value in settings.items())
    numbers = Counter(card.name for card in cards)
    found = ", ".join(f"{number} x {name}" for name, number in numbers.items())
    text = _FINETUNE_POOL.sub(r"\1low_memory ", text)
    text = _LOW_MEMORY.sub(
        f"  # {found} in one machine. They cost nothing per hour, so that a plan states hours and kWh.\n"
        f"  low_memory:  {{{pool}}}",
        text,
    )
    return _HIGH_MEMORY.sub(r"  # Rented large cards would fine-tune with finetune.pool high_memory:\n  # \1", text)


def local_gpus(
    driver: Path = Path("/proc/driver/nvidia/gpus"), compute: Path = Path("/sys/class/kfd/kfd/topology/nodes")
) -> int:
    """Number of GPUs that the NVIDIA or AMD driver lists; importing torch to count them would take seconds.

    Args:
        driver: Directory with one folder per NVIDIA GPU.
        compute: Directory with one folder per processor of AMD's driver; GPUs have a `gpu_id` other than 0.
    """
    nvidia = len(list(driver.iterdir())) if driver.is_dir() else 0
    amd = sum(path.read_text(encoding="ascii").strip() != "0" for path in compute.glob("*/gpu_id"))
    return nvidia + amd
