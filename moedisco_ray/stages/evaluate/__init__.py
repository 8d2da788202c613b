"""Measure models on validation documents: perplexity, bits per byte, expert load, router entropy, specialisation."""

from moedisco_ray.stages.evaluate.documents import Documents, load_documents
from moedisco_ray.stages.evaluate.held_out import ValidationSlice
from moedisco_ray.stages.evaluate.measure import evaluate, evaluate_ensemble, evaluate_stages, evaluate_unseen
from moedisco_ray.stages.evaluate.scoring import Score, document_nats, perplexity

__all__ = [
    "Documents", "Score", "ValidationSlice", "document_nats", "evaluate", "evaluate_ensemble", "evaluate_stages",
    "evaluate_unseen", "load_documents", "perplexity",
]
