"""Operations of Muon's arithmetic: Newton-Schulz steps of every matrix of the layers, whatever the number of tokens."""

from __future__ import annotations

from moedisco_ray.core.config import Architecture
from moedisco_ray.core.families import DECLARATIONS, Family, FamilyName
from moedisco_ray.core.limits import NEWTON_SCHULZ_STEPS
from moedisco_ray.plan.parameters import dense_hidden_size, latent_sizes, recurrent_sizes, shared_hidden_size

Shape = tuple[int, int]


def newton_schulz_flops(rows: int, columns: int) -> int:
    """Operations that orthogonalise a matrix: 5 (4 m² n + 2 m³) for sides m <= n.

    A step has two products of the matrix with a square, and one of two squares.
    """
    short, long = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * short**2 * long + 2 * short**3)


def muon_flops(family: FamilyName, architecture: Architecture) -> int:
    """Operations of Muon in one update of a model."""
    declaration, hidden, layers = DECLARATIONS[family], architecture.hidden_size, architecture.num_hidden_layers
    dense_layers = min(layers, declaration.dense_layers(architecture.fields))
    recurrent_layers = declaration.recurrent_layers(architecture.fields, layers)
    size = architecture.moe_intermediate_size
    gates = [(2 * size, hidden)] if declaration.interleaved else [(size, hidden)] * 2
    experts = architecture.num_experts * _together([*gates, (size, hidden)])
    shared = _together([(shared_hidden_size(family, architecture), hidden)] * 3)
    dense = _together([(dense_hidden_size(family, architecture), hidden)] * 3)
    attention = _together((_latent if declaration.attention.latent else _grouped)(declaration, architecture))
    recurrent = _together(_recurrent(declaration, architecture)) if recurrent_layers else 0
    mixers = (layers - recurrent_layers) * attention + recurrent_layers * recurrent
    return mixers + (layers - dense_layers) * (experts + shared) + dense_layers * dense


def _together(matrices: list[Shape]) -> int:
    return sum(newton_schulz_flops(*matrix) for matrix in matrices)


def _grouped(family: Family, sizes: Architecture) -> list[Shape]:
    rows, keys = sizes.num_attention_heads * sizes.head_size, sizes.key_value_heads * sizes.head_size
    queries, hidden = rows * (1 + family.attention.output_gate), sizes.hidden_size
    return [(hidden, queries), (hidden, keys), (hidden, keys), (rows, hidden)]


def _latent(family: Family, sizes: Architecture) -> list[Shape]:
    query_latent, latent, plain, rotated, value = latent_sizes(family, sizes)
    hidden, heads = sizes.hidden_size, sizes.num_attention_heads
    queries = heads * (plain + rotated)
    return [
        (hidden, latent + rotated),
        (latent, heads * (plain + value)),
        (heads * value, hidden),
        *([(hidden, query_latent), (query_latent, queries)] if query_latent else [(hidden, queries)]),
    ]


def _recurrent(family: Family, sizes: Architecture) -> list[Shape]:
    key_heads, heads, key_size, value_size, _ = recurrent_sizes(family, sizes)
    keys, values = key_heads * key_size, heads * value_size
    fused = family.recurrence is not None and family.recurrence.fused
    rows = (2 * (keys + values), 2 * heads) if fused else (2 * keys + values, values, heads, heads)
    return [(sizes.hidden_size, each) for each in (*rows, values)]
