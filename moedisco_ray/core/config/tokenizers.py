"""The directory from which a run takes its tokenizer, and the tokenizer's files in it. Nothing here opens a file."""

from __future__ import annotations

from pathlib import Path

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.config.start_files import named_tokenizer, start_directory
from moedisco_ray.core.errors import ConfigError

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
_SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


def tokenizer_files(directory: Path) -> tuple[Path, ...]:
    """Tokenizer and chat template files of a model directory; empty if it has no vocabulary file."""
    if not _matching(directory, _VOCABULARIES):
        return ()
    return _matching(directory, (*_VOCABULARIES, *_SETTINGS))


def tokenizer_directory(config: RunConfig) -> Path | None:
    """The directory of the run's tokenizer; None if the run trains one on its corpus.

    Raises:
        ConfigError: The run starts from a model without tokenizer files, and `tokenizer.path` is not set.
    """
    if config.tokenizer.path is not None:
        return named_tokenizer(config.tokenizer)
    start = config.model.init
    if not isinstance(start, LocalInit) or config.tokenizer.replace:
        return None
    directory = start_directory(start)
    if not tokenizer_files(directory):
        raise ConfigError(
            "tokenizer.path",
            None,
            f"is not set, and {start.setting} {str(start.place)!r} holds no tokenizer files; name a directory with the "
            "tokenizer that this model was trained with",
        )
    return directory


def _matching(directory: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}))
