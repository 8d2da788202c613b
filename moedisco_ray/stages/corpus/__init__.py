"""From text to deduplicated, split, tokenised documents and packed tokens.

sources    configured sources to concrete inputs; embedded text becomes named sources
endings    what a file's ending says about its format
files      the files under a path or URI
streams    bytes in bounded pieces, and what is wrong with those that are not UTF-8
plain_text plain text to documents
rows       the texts of a column of JSON Lines, CSV, Parquet and Arrow files
readers    the documents of a slice of a file, whatever its format
documents  identity, duplicates, split and copies: laws over document ids
staging    read texts once, scattered into id ranges ("buckets") on disk
buckets    one bucket to its final documents
build      all of it in order
probe      a look at the beginning of every source, before a run
unseen     a bounded sample of other text, to judge a model on
"""

from moedisco_ray.stages.corpus.build import build
from moedisco_ray.stages.corpus.probe import Probe, probe
from moedisco_ray.stages.corpus.sources import input_identity
from moedisco_ray.stages.corpus.unseen import read_unseen

__all__ = ["Probe", "build", "input_identity", "probe", "read_unseen"]
