"""Price books: one cheap and one large card each, with price and speed, to price the same operations in three markets.

The speed of a card is its peak in bf16 by the data sheets (`moedisco_ray.core.cards`) relative to the A100-80GB, unless
the paper says otherwise. A card with more peak speed also leaves more of it unused: an H100 trains 2.5 times as fast as
an A100, not 3.2 times.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml

from benchmarks.study.grid.records import Dollars, Phase
from moedisco_ray.core.cards import peak_flops
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.summaries import Record

CLUSTER_FILE = Path(__file__).resolve().parents[3] / "cluster_yaml" / "aws/spot.yaml"
CHEAP_NODE, LARGE_NODE, JOINING_NODE = "low-l4-spot", "high-h100-spot", "rtx4090"
"""Node types of the cluster file: the cheapest FLOP of each pool on AWS, and a machine of a marketplace that joins."""
_MEASURED_SPEED = {"H100": 2.5}
"""Assumed training speeds relative to the A100-80GB where the data sheet's ratio is known to be too high."""
_REFERENCE = "A100-80GB"

BookName = Literal["paper", "marketplace", "aws"]


class Card(Record):
    """A rented card."""

    gpu: str
    price_per_hour: float
    """Dollars per hour."""
    speed: float
    """Training speed relative to one A100-80GB."""

    @property
    def flop_price(self) -> float:
        """Price of an operation relative to one on an A100-80GB at a dollar per hour."""
        return self.price_per_hour / self.speed


class PriceBook(Record):
    """The prices of one market."""

    name: BookName
    cheap: Card
    large: Card


@functools.cache
def books() -> Mapping[BookName, PriceBook]:
    """The three price books.

    `paper` has the prices and speeds of the preset `paper`. `marketplace` has the RTX 4090 of the cluster files at its
    data-sheet speed, and the paper's A100. `aws` has spot prices of the cluster file for AWS.
    """
    pools = yaml.safe_load(preset_text("paper"))["pools"]
    paper = PriceBook(
        name="paper",
        cheap=_pool_card("RTX 4090", pools["low_memory"]),
        large=_pool_card(_REFERENCE, pools["high_memory"]),
    )
    found = {
        "paper": paper,
        "marketplace": PriceBook(name="marketplace", cheap=_node_card(JOINING_NODE), large=paper.large),
        "aws": PriceBook(name="aws", cheap=_node_card(CHEAP_NODE), large=_node_card(LARGE_NODE)),
    }
    return {book.name: book for book in found.values()}


def dollars(phases: Sequence[Phase], joint: Sequence[Phase], factor: float | None = 1.0) -> Dollars:
    """Dollars of a run relative to joint training on the large card, in each price book.

    Args:
        phases: Phases of the run.
        joint: Phases of joint training.
        factor: Tokens relative to those of the run; None if they are unknown.
    """
    return Dollars(
        **{
            name: None if factor is None else factor * _price(phases, book) / _price(joint, book)
            for name, book in books().items()
        }
    )


def hours_ratio(phases: Sequence[Phase], joint: Sequence[Phase], book: PriceBook) -> float:
    """Hours of a run relative to joint training's, at the speeds of a price book."""
    return _hours(phases, book) / _hours(joint, book)


def _price(phases: Sequence[Phase], book: PriceBook) -> float:
    return sum(phase.flops * _card(phase, book).flop_price for phase in phases)


def _hours(phases: Sequence[Phase], book: PriceBook) -> float:
    return sum(phase.flops / (_card(phase, book).speed * phase.workers) for phase in phases)


def _card(phase: Phase, book: PriceBook) -> Card:
    return book.cheap if phase.pool == "low_memory" else book.large


def _pool_card(gpu: str, pool: Mapping[str, float]) -> Card:
    return Card(gpu=gpu, price_per_hour=pool["price_per_hour"], speed=pool["speed"])


def _node_card(node_type: str) -> Card:
    facts = yaml.safe_load(CLUSTER_FILE.read_text(encoding="utf-8"))["metadata"]["moedisco"]["node_types"][node_type]
    gpu = str(facts["gpu"])
    peak, reference = peak_flops(gpu), peak_flops(_REFERENCE)
    if peak is None or reference is None:
        raise ValueError(f"no data-sheet speed of {gpu}; add it to moedisco_ray/core/cards.py")
    return Card(gpu=gpu, price_per_hour=facts["price_per_hour"], speed=_MEASURED_SPEED.get(gpu, peak / reference))
