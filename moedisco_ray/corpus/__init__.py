"""From text to deduplicated, split, tokenised documents and packed tokens.

sources    configured sources to concrete inputs; embedded text becomes named sources
files      what lies under a path or URI
readers    the texts of a slice of a file
documents  identity, duplicates, split and copies: laws over document ids
staging    read texts once, scattered into id ranges ("buckets") on disk
buckets    one bucket to its final documents
packing    documents to packed tokens
build      all of it in order
unseen     a bounded sample of other text, to judge a model on
"""

from moedisco_ray.corpus.build import build
from moedisco_ray.corpus.packing import Keep, pack, part_path
from moedisco_ray.corpus.sources import input_identity
from moedisco_ray.corpus.tokenizer import Encoder
from moedisco_ray.corpus.unseen import read_unseen

__all__ = ["Encoder", "Keep", "build", "input_identity", "pack", "part_path", "read_unseen"]
