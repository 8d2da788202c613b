"""The command that writes a configuration for the machine, the text and the model that a user has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from moedisco_ray.cli.arguments import USUAL_FILE, NewFile
from moedisco_ray.cli.console import say, say_text
from moedisco_ray.core.config import Source
from moedisco_ray.core.config.inits import CheckpointInit
from moedisco_ray.core.config.presets import (
    LocalCard,
    PresetName,
    from_model,
    local_gpus,
    named_cards,
    on_own_cards,
    on_text,
    preset_text,
    tokens_for,
)
from moedisco_ray.core.config.start_sizes import holds_experts
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.config.yaml_text import parse_yaml
from moedisco_ray.core.errors import CheckpointError, ConfigError, CorpusError
from moedisco_ray.core.limits import TEXT_BYTES_PER_TOKEN
from moedisco_ray.core.records.findings import reading_note
from moedisco_ray.core.store.locations import is_uri
from moedisco_ray.execution.local_cards import host_memory_gb, local_cards
from moedisco_ray.execution.text_size import listed_bytes
from moedisco_ray.plan.text_size import text_bytes


def init(
    path: NewFile = USUAL_FILE,
    preset: Annotated[
        PresetName | None, typer.Option(help="Preset to write.", show_default="default with a GPU, demo without one")
    ] = None,
    cards: Annotated[
        str | None, typer.Option(help="Own cards of one machine, such as `8 x RTX 4090`; without it, those found here.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Your text: a file, folder, glob or URI; may be repeated.", metavar="PATH")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Model to start from: a directory or a name of the Hugging Face hub.", metavar="MODEL"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented configuration: the named preset, or one that this machine can run, for the GPUs found here."""
    if cards is not None and preset not in (None, "default"):
        raise ConfigError("--cards", cards, f"cannot be in the preset {preset}; leave out --preset")
    found: tuple[LocalCard, ...] = ()
    if cards is not None:
        found = named_cards(cards)
    elif preset is None:
        found = local_cards()
    chosen = preset or ("default" if found or local_gpus() else "demo")
    content = preset_text(chosen)
    if found:
        content = on_own_cards(content, found, host_memory_gb() if cards is None else None)
    usual = parse_yaml(content)["tokens"]["total"]
    size, reason = _text_tokens(text or ())
    total = usual if size is None else tokens_for(size, usual)
    if text:
        content = on_text(content, text, total)
    if start is not None:
        content = from_model(content, start, moe=_is_moe(start))
    if str(path) == "-":
        say_text(content)
        return
    _write(path, content, force=force)
    _explain(found, preset, chosen, here=cards is None)
    if size is not None:
        say(f"tokens.total is {total:,}: {reading_note(total, size, f'the text, about {size:,} tokens, is read')}")
    elif text:
        say(f"tokens.total is {total:,}, as in the preset, because the size of the text is unknown: {reason}")
    say(f"wrote {path} (preset {chosen}); next: moedisco plan {path}")


def _text_tokens(places: Sequence[str]) -> tuple[int | None, str]:
    """Estimated number of tokens of the text, at least 1, or None and the reason why it is unknown.

    Raises:
        ConfigError: A run cannot read a file, folder or glob.
    """
    total = 0
    for place in places:
        if not place:
            raise ConfigError("--text", place, "is no file, folder, glob or URI; name one")
        try:
            size = text_bytes({"--text": Source(path=place)}, listed_bytes)
        except ValidationError as error:
            raise ConfigError("--text", place, plain_words(error.errors()[0])) from error
        except CorpusError as error:
            if error.value == place:
                raise ConfigError("--text", place, error.remedy) from error
            return None, f"{error.value} {error.remedy}"  # the rest can be read once that file is left out
        if size is None:
            where = "is at a URI" if is_uri(place) else "has too many files to count"
            return None, f"{place} {where}"
        total += size
    return (max(1, total // TEXT_BYTES_PER_TOKEN), "") if places else (None, "")


def _is_moe(start: str) -> bool:
    try:
        return holds_experts(CheckpointInit(checkpoint=start))
    except CheckpointError as error:
        raise CheckpointError("--start", error.value, error.remedy) from error


def _write(path: Path, content: str, *, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError as error:
        raise ConfigError("PATH", str(path), "exists already; choose another, or pass --force") from error
    except OSError as error:
        raise ConfigError("PATH", str(path), f"cannot be written ({error.strerror})") from error


def _explain(found: Sequence[LocalCard], preset: PresetName | None, chosen: PresetName, *, here: bool) -> None:
    if found:
        cards = f"{len(found)} x {found[0].name}"
        say(
            f"all stages run on the GPUs of this machine: {cards}"
            if here
            else f"all stages run on one machine with {cards}; set its main memory, pools.low_memory.host_memory_gb"
        )
    elif preset is None and chosen == "demo":
        say(
            "no GPU found here: the `demo` preset runs on CPU cores; "
            "`--preset default` is for GPUs, here or on a cluster"
        )
    elif preset is None:
        say("the GPUs found here have no known name: set card or memory_gb, and max_workers, in pools.low_memory")
