"""Peak speed of GPUs, to compute the share of it that training reaches (model FLOPs utilisation, MFU).

The values are from the vendor's data sheets, for dense bf16 matrix products with fp32 accumulation. T4 and V100 do not
support bf16, so their values are for fp16.
"""

from __future__ import annotations

import re

_PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "A6000": 155,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}
"""Peak speed in TFLOP/s. A key is one or several words of the GPU's name in CUDA; the first key that occurs in the name
is used."""


def peak_flops(card: str) -> float | None:
    """Peak speed of a GPU (FLOP/s), given its name in CUDA; None if the GPU is not in the table."""
    return next((tflops * 1e12 for name, tflops in _PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", card)), None)
