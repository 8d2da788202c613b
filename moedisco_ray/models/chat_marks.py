"""Mark in a chat template where the text of each message begins and ends.

A template writes a conversation in a loop over its messages. An empty `{% generation %}` block at the start of each
round and after the loop changes nothing in the text, and transformers returns the place of each. Which message a round
writes follows from the roles, because the mark of an assistant's round is repeated.

Some templates leave the thinking out of all answers but the last, as is right for a conversation that continues. To
train on every answer, its thinking must be there, so `keep_thinking` changes the conditions of known templates, as the
training templates of TRL do.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jinja2 import Environment, TemplateError

_LEXER = Environment(trim_blocks=True, lstrip_blocks=True, autoescape=True)
"""Reads templates as transformers does; it renders nothing."""
_MARK = "{% generation %}{% endgeneration "
_LOOP = re.compile(r"for\s+(\w+)\s+in\s+\w*messages\s*(\[\s*\d+\s*:\s*\])?")
"""A loop over the messages, or over those after a system message."""
_BLOCKS = ("for", "if", "macro", "call", "filter", "with", "block", "generation", "autoescape", "trans")
_TRANSPARENT = ("if", "with")
"""Blocks whose output reaches the text at once; the others collect it first."""
_IS_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DROPPED_THINKING = (
    # Qwen3 and its successors: the thinking is written after the last question only, and without one, no empty one.
    (re.compile(r"loop\.index0\s*>\s*ns\.last_query_index"), "true"),
    (re.compile(r"loop\.last or \(not loop\.last and reasoning_content\)"), "true"),
    # DeepSeek-R1: an answer begins after its thinking.
    (
        re.compile(
            r"\{%-?\s*if '</think>' in content\s*-?%\}\s*"
            r"\{%-?\s*set content = content\.split\('</think>'\)\[-1\]\s*-?%\}\s*\{%-?\s*endif\s*-?%\}"
        ),
        "",
    ),
)
"""Conditions of published templates under which they leave out thinking, and what to write instead."""

Span = tuple[int, int]
"""First and last character (exclusive)."""


class _Block(NamedTuple):
    name: str
    start: int
    variable: str | None


def is_marked(template: str) -> bool:
    """Whether a template marks the assistant's text itself."""
    return _IS_MARKED.search(template) is not None


def keep_thinking(template: str) -> str:
    """The template with the thinking of all answers; the same template if it is not known to leave any out."""
    for pattern, replacement in _DROPPED_THINKING:
        template = pattern.sub(replacement, template)
    return template


@functools.lru_cache(maxsize=8)
def with_marks(template: str) -> str | None:
    """The template with an empty `{% generation %}` block at the start of each message; None without such a loop."""
    try:
        tokens = [(kind, text) for _, kind, text in _LEXER.lex(template)]
    except TemplateError:
        return None
    # Where the lexer has removed white space after a brace, the brace would begin a tag with what follows.
    pieces = [f'{text[:-1]}{{{{ "{{" }}}}' if kind == "data" and text.endswith("{") else text for kind, text in tokens]
    found = False
    for loop, end in _loops(tokens):
        close = pieces[loop.start]
        role = f"{{% if {loop.variable}.role == 'assistant' %}}{_MARK}%}}{{% endif %}}"
        pieces[loop.start] = f"{close.rstrip()}{role}{_MARK}{close}"
        pieces[end] = f"{pieces[end].rstrip()}{_MARK}{pieces[end]}"
        found = True
    return "".join(pieces) if found else None


def rounds(marks: Sequence[Span], roles: Sequence[str]) -> list[Span | None] | None:
    """The place of each message in a text, from the spans of a template `with_marks`.

    Args:
        marks: Spans of all `{% generation %}` blocks.
        roles: Roles of the messages.

    Returns:
        For each message its place, or None if it is written elsewhere, as some templates write the system message. None
        for all if the marks are not those of one loop over the messages.
    """
    places = [start for start, stop in marks if start == stop]
    for first in range(len(roles)):
        repeated = [1 + (role == "assistant") for role in roles[first:]]
        if sum(repeated) + 1 == len(places):
            ends = [*_starts(repeated, places), places[-1]]
            return [*([None] * first), *itertools.pairwise(ends)]
        if roles[first] == "assistant":
            break
    return None


def _starts(repeated: Sequence[int], places: Sequence[int]) -> Iterator[int]:
    at = 0
    for count in repeated:
        yield places[at]
        at += count


def _loops(tokens: Sequence[tuple[str, str]]) -> Iterator[tuple[_Block, int]]:
    """Loops over messages that write text, each with the place of the token that ends it."""
    opened: list[_Block] = []
    writes = False
    tag: list[str] = []
    for at, (kind, text) in enumerate(tokens):
        if kind == "block_begin":
            tag = []
        elif kind == "block_end":
            code = "".join(tag).strip()
            name = code.split(None, 1)[0] if code else ""
            if name in _BLOCKS or (name == "set" and "=" not in code):
                loop = _LOOP.fullmatch(code)
                is_outer = loop is not None and all(each.name in _TRANSPARENT for each in opened)
                opened.append(_Block(name, at, loop.group(1) if loop is not None and is_outer else None))
                writes = writes and not is_outer
            elif name.startswith("end") and opened:
                block = opened.pop()
                if block.variable is not None and writes:
                    yield block, at
        elif kind == "variable_begin":
            writes = writes or not _raises(tokens, at)
        elif kind == "data":
            writes = writes or bool(text.strip())
        else:
            tag.append(text)


def _raises(tokens: Sequence[tuple[str, str]], at: int) -> bool:
    """Whether an output only refuses the conversation."""
    words = (text for kind, text in tokens[at + 1 :] if kind != "whitespace")
    return next(words, "") == "raise_exception"
