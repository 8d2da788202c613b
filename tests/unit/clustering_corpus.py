"""A small corpus artifact and model for the tests of clustering."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moedisco_ray.core.config import RunConfig
from moedisco_ray.stages.text.tokenizer import save_trained

WORDS = {
    "sea": ["ship", "harbour", "sail", "anchor", "storm", "captain", "wave", "island", "tide", "rope", "mast", "deck"],
    "kitchen": ["flour", "butter", "oven", "sugar", "knead", "dough", "bread", "salt", "yeast", "bake", "crust", "jam"],
    "court": ["judge", "statute", "clause", "appeal", "verdict", "counsel", "witness", "oath", "claim", "brief", "law"],
}
_ALL = ["<|endoftext|>", "and", *[word for words in WORDS.values() for word in words]]
VOCABULARY = {word: i for i, word in enumerate(_ALL)}


def ids_of(words: Iterable[str]) -> list[int]:
    return [VOCABULARY[word] for word in words]


def write_corpus(directory: Path, documents: int = 240, parts: int = 3, seed: int = 0) -> Path:
    """Three domains with few words in common, in parts by ascending id."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(documents):
        name = list(WORDS)[i % 3]
        own, any_two = generator.choice(WORDS[name], generator.integers(5, 40)), generator.choice(_ALL[1:], 2)
        words = [*own, "and", *any_two]
        text = " ".join(map(str, words))
        rows.append(
            {
                "id": hashlib.blake2b(text.encode(), digest_size=16).digest(),
                "source": name,
                "text": text,
                "tokens": ids_of(words),
                "packed": len(words) + 1,
                "copies": 1 + i % 7 // 6,
            }
        )
    rows.sort(key=lambda row: row["id"])
    schema = pa.schema(
        [
            ("id", pa.binary(16)),
            ("source", pa.string()),
            ("text", pa.string()),
            ("tokens", pa.list_(pa.int32())),
            ("packed", pa.int32()),
            ("copies", pa.int32()),
            ("loss_mask", pa.list_(pa.bool_())),
        ]
    )
    (directory / "train").mkdir(parents=True)
    for p in range(parts):
        chosen = [row for row in rows if int.from_bytes(row["id"][:4], "big") * parts >> 32 == p]
        pq.write_table(pa.Table.from_pylist(chosen, schema), directory / "train" / f"part-{p:05d}.parquet")
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="and"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_trained(tokenizer, directory / "tokenizer")
    return directory


def write_model(directory: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=16,
        intermediate_size=16,
        num_experts=1,
        num_experts_per_tok=1,
        max_position_embeddings=128,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(directory)
    return directory


def run_config(**clusters: object) -> RunConfig:
    settings = {"count": 3, "vectors": "tfidf_svd"} | clusters
    return RunConfig.model_validate(
        {
            "name": "test",
            "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 16},
            "clusters": settings,
            "model": {"config": {"num_experts": 12}},
        }
    )
