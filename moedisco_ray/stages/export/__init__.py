"""The finished model as a Hugging Face directory that needs nothing of this package, and what it writes."""

from moedisco_ray.stages.export.card import model_card, write_card
from moedisco_ray.stages.export.directory import export
from moedisco_ray.stages.export.origin import Origin
from moedisco_ray.stages.export.samples import continue_prompts, generate_samples

__all__ = ["Origin", "continue_prompts", "export", "generate_samples", "model_card", "write_card"]
