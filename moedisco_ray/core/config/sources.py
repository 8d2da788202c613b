"""Sources of text, in the corpus and in the evaluation."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from moedisco_ray.core.config.base import Section
from moedisco_ray.core.config.places import ReadsFrom
from moedisco_ray.core.globs import Glob

FunctionName = Annotated[str, Field(max_length=256, pattern=r"^[\w.]+:\w+$")]
"""Name of a Python function, as MODULE:FUNCTION."""
MOST_SOURCES = 1000
LONGEST_GLOB = 1024
"""Maximum length of a glob of files to leave out (characters)."""
_GIVEN = ("messages_column", "instruction_column", "completion_column", "ids_column")
"""Settings that name a column to read instead of text; they exclude each other."""
_WITH = {
    "messages_column": ("tools_column",),
    "instruction_column": ("tools_column",),
    "completion_column": ("prompt_column", "tools_column"),
}
"""Further settings of columns that are read with such a column."""
_WHERE_THEY_ARE = {
    "messages_column": ("system",),
    "instruction_column": ("input", "output", "system", "history"),
    "ids_column": ("labels",),
}
"""Columns that are read with such a column where a file has them."""


def _is_a_glob(text: str) -> str:
    Glob.of(text)
    return text


class Source(Section):
    """Text from one place."""

    path: Annotated[str, ReadsFrom(uris=True, run_part="corpus"), AfterValidator(_is_a_glob)]
    """A file, a folder, a glob, or any URI that a pyarrow file system reads (`s3://`, `gs://`).
    `hf://datasets/ORG/NAME` is a data set of the Hugging Face hub, and `hf://datasets/ORG/NAME@REVISION` is the same at
    a branch, tag or commit; a commit keeps the text the same. Its files are read in place, without a download; HF_TOKEN
    holds the token. `embedded` is the text of the installed packages. On a control service, `run://RUN/corpus` is the
    corpus of the finished run whose id or name is RUN; its split into training and held-out text is kept. There,
    `dataset://NAME@sha256:HASH` is text that was uploaded, and `dataset://NAME` the newest of this name."""
    split: str | None = Field(None, min_length=1)
    """Split of a data set to read, such as `train`. The data set's card says which files belong to it, or their names
    or folders do, as in Hugging Face `datasets`. With null, all files are read."""
    subset: str | None = Field(None, min_length=1)
    """Subset (configuration) of a data set whose card lists several; needs `split`."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Name of the domain; the report shows how clusters and experts relate to it."""
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "datasets"] = "auto"
    """Format of the files. `auto` decides by each file's ending and rejects unknown endings; in a folder with tables or
    JSON Lines it skips plain text files and lists them. `datasets` is a folder that Hugging Face `save_to_disk` wrote.
    In `tsv`, quotation marks are text."""
    text_column: str = "text"
    """Column with the text, in JSONL, CSV, TSV, Parquet and datasets."""
    messages_column: str | None = None
    """Column with conversations, in JSONL, Parquet and datasets: lists of messages with `role` and `content`, or with
    `from` and `value`, as ShareGPT has them. A column `system` holds the system prompt of a row, if there is one. The
    tokenizer's chat template renders the conversations, with the thinking of every answer, and the loss counts only the
    assistant's tokens, in training and evaluation, but none of a message with `weight: 0`. If the template marks these
    tokens with `{% generation %}`, its marks decide. A row that cannot be rendered, or whose answers cannot be found in
    the text, is skipped and counted. Training packs whole conversations into sequences, by best fit, and each attends
    to itself alone; of one that is longer than a sequence, the end is left out and counted. With null, `text_column` is
    read."""
    instruction_column: str | None = None
    """Column with the instructions of rows in Alpaca's format, in JSONL, Parquet and datasets. The columns `input`,
    `output`, `system` and `history` are read with it; only `output` has to exist. The chat template renders them as a
    conversation: the instruction and, on the next line, the input, and then the output. With null, `text_column` is
    read."""
    train_on: Literal["all", "last"] = "all"
    """Which answers of a conversation the loss counts, with `messages_column` or `instruction_column`: all, or the last
    one."""
    completion_column: str | None = None
    """Column with completions of the prompts in `prompt_column`; the loss counts only the completions. Both columns
    hold text, or both hold lists of messages as in `messages_column`, which the chat template renders. The
    end-of-sequence token follows a completion of text, and counts. With null, `text_column` is read."""
    prompt_column: str = "prompt"
    """Column with the prompts of `completion_column`."""
    tools_column: str | None = None
    """Column with the tools that the chat template receives with the messages of a row: a list of JSON schemas, the
    same as JSON text, or null. With null, it receives no tools."""
    ids_column: str | None = None
    """Column with token ids of the run's tokenizer, in JSONL, Parquet and datasets, which are trained on unchanged. Of
    a row with a column `labels`, the loss leaves out the tokens whose label is -100. With null, the text is
    tokenized."""
    map: FunctionName | None = None
    """Function that changes or drops rows, as MODULE:FUNCTION. It gets a row as a dict, with all columns of a table, or
    with `text` for a document of plain text, and returns the row to read, or None to drop it. It must depend on the row
    alone. A `def` in a file next to the configuration, or in a package on all machines that read text, defines it.
    `moedisco run` calls it only if `--allow-code` lists it, or after a question. If the file that defines it changes,
    the corpus is made again. A control service allows only the functions that its operator names (`moedisco serve
    --map-function`)."""
    documents: Literal["auto", "file", "paragraph", "line"] = "auto"
    """What one document of plain text is. With `auto` it is about as long as one training sequence, and is cut at blank
    lines, or inside longer paragraphs at line ends, sentence ends or words. With `file` it is a whole file, with
    `paragraph` the text between two blank lines, and with `line` one line; the validation split may then separate
    neighbouring lines."""
    exclude: tuple[Annotated[str, Field(max_length=LONGEST_GLOB), AfterValidator(_is_a_glob)], ...] = Field(
        (), max_length=256
    )
    """Globs of files to leave out. A glob without a slash (`*.log`) matches file names; one with a slash (`drafts/**`)
    matches paths below the source's folder. `**` stands alone between slashes."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do with a file that is binary, not UTF-8, damaged or has an unknown ending: end the run, or skip the file
    and list it in the report."""

    @property
    def copies(self) -> float:
        """Number of copies of each document in one pass."""
        return 1.0

    @property
    def data_owner(self) -> str | None:
        """The data owner whose text it is; None: text without an owner."""
        return None

    @property
    def columns(self) -> dict[str, str]:
        """Table columns that make documents, by the setting that names each; rows without the first are left out."""
        kind = next((name for name in _GIVEN if getattr(self, name) is not None), "text_column")
        names = (kind, *_WITH.get(kind, ()))
        return {name: column for name in names if (column := getattr(self, name)) is not None}

    @property
    def further_columns(self) -> tuple[str, ...]:
        """Table columns that are read with the others where a file has them."""
        return _WHERE_THEY_ARE.get(next(iter(self.columns)), ())

    @property
    def has_given_tokens(self) -> bool:
        """Whether the source has conversations, completions or token ids for the run's tokenizer, instead of text."""
        return "text_column" not in self.columns

    @property
    def has_conversations(self) -> bool:
        """Whether its documents are trained on as whole conversations, or prompts with their completions."""
        return self.has_given_tokens and self.ids_column is None

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> Self:
        if self.subset is not None and self.split is None:
            raise ValueError("subset needs a split; set split, for example to train")
        if sum(getattr(self, name) is not None for name in _GIVEN) > 1:
            *others, last = _GIVEN
            raise ValueError(f"{', '.join(others)} and {last} exclude each other; name one of them")
        if self.train_on != "all" and not (self.messages_column or self.instruction_column):
            raise ValueError("train_on needs conversations; name messages_column or instruction_column")
        if (self.prompt_column, self.completion_column) == ("instruction", "output"):
            raise ValueError("rows of Alpaca's format also have inputs; set instruction_column instead of both columns")
        if self.tools_column is not None and "tools_column" not in self.columns:
            raise ValueError(
                "tools_column needs the column of the messages; name messages_column, instruction_column or "
                "completion_column"
            )
        formats = ("text",) if self.completion_column and not self.tools_column else ("text", "csv", "tsv")
        if self.has_given_tokens and (self.path == "embedded" or self.format in formats):
            raise ValueError(
                f"{next(iter(self.columns))} needs files that can hold it; name JSON Lines, Parquet or saved datasets"
            )
        return self


class CorpusSource(Source):
    """Text to train on from one place."""

    weight: float = Field(1.0, gt=0, le=100)
    """Number of copies of each document in one pass over the corpus; 0.5 keeps half of the documents."""
    owner: str | None = None
    """Data owner in `pools.owners` that the text stays with: only the owner's nodes read it. With null, the text has no
    owner. Such text serves for the tokenizer, the seed, the routers, the fine-tune and the evaluation."""

    @property
    def copies(self) -> float:
        return self.weight

    @property
    def data_owner(self) -> str | None:
        return self.owner


S = TypeVar("S", bound=Source)


def _each_once(sources: tuple[S, ...]) -> tuple[S, ...]:
    return tuple(dict.fromkeys(sources))  # a repeated source adds nothing: of equal documents only the first is kept


def _not_too_many(sources: object) -> object:
    # This check runs before the entries are validated, so that a service does not spend time on a huge list.
    if isinstance(sources, list | tuple) and len(sources) > MOST_SOURCES:
        raise ValueError(f"are {len(sources)} sources, more than {MOST_SOURCES}; name folders or globs of many files")
    return sources


Sources = Annotated[
    tuple[S, ...], Field(max_length=MOST_SOURCES), AfterValidator(_each_once), BeforeValidator(_not_too_many)
]
