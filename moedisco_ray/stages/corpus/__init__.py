"""Turn text into deduplicated, split and tokenized documents and packed tokens.

sources    expand configured sources into inputs; embedded text becomes one input per domain
formats    detect a file's format by its ending, and find the files of saved data sets
files      list the files under a path or URI
entries    bound the number of files and folders that are looked at
splits     find the files of a split of a data set
streams    read bytes in bounded pieces, and explain why bytes are not UTF-8 text
plain_text cut plain text into documents
rows       read the text column, or whole rows, of JSON Lines, CSV, Parquet and Arrow files
row_map    call the function of a source that changes or drops its rows
readers    read the documents of a slice of a file of any format
documents  identify documents, and find equal ones, the validation split and the number of copies by their ids
near_duplicates  find documents that nearly repeat another one
reading    read units into tables of documents
rules      decide which documents are kept, held out and repeated
tokens     tokenize documents
parts      write the documents and packed tokens of a range of ids
steps      all of these as functions that can be sent to other machines
tables     the engine that runs the functions over all documents here; `execution.ray.corpus` has the one on Ray
build      the whole stage
summary    the figures of the stage
probe      check the beginning of every source before a run
unseen     read a bounded sample of text outside the corpus, for the evaluation
"""

from moedisco_ray.stages.corpus.build import build, counting
from moedisco_ray.stages.corpus.probe import Probe, probe
from moedisco_ray.stages.corpus.sources import input_identity
from moedisco_ray.stages.corpus.unseen import read_unseen

__all__ = ["Probe", "build", "counting", "input_identity", "probe", "read_unseen"]
