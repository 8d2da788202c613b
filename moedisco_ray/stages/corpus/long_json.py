"""Read one text from a JSON object piece by piece, because the object is too long to hold in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

from moedisco_ray.stages.corpus.streams import NotTextError

_WHOLE = re.compile(
    r'(?:[^"\\]++'  # plain characters
    r'|\\["\\/bfnrt]'  # short escapes
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # surrogate pairs
    r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}"  # other escapes of a character
    r")*+"
)
"""Matches the longest prefix of a JSON string's content that cuts neither an escape sequence nor a surrogate pair."""
_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
"""Matches the first half of a surrogate pair, which JSON allows without the second half."""
_LONGEST_CHARACTER = 12
"""Length of the longest escaped character: a surrogate pair."""
_SPACE = re.compile(r"[ \t\r\n]*")
_NO_BRACKET = re.compile(r'[^"{}\[\]]+')
_SCALAR = re.compile(r"[^,}\]]*")


def read_member(line: Iterable[str], name: str, where: str) -> Iterator[str] | dict[str, str]:
    """Read the text of one member of a JSON object in pieces; the rest of the object is not read.

    Args:
        line: The object in pieces of any size.
        name: Name of the member that holds the text.
        where: Place of the object, for error messages.

    Returns:
        The pieces of the text. If the object has no text with this name: the names of all members, each with the first
        character of its value.

    Raises:
        NotTextError: The object is not JSON. The iterator raises it too.
    """
    scanner = _Scanner(line, where)
    members: dict[str, str] = {}
    scanner.expect("{")
    while scanner.peek() == '"':
        member = "".join(scanner.string())
        scanner.expect(":")
        members[member] = scanner.peek()
        if member == name and members[member] == '"':
            return scanner.string()
        scanner.skip_value()
        if scanner.peek() != ",":
            break
        scanner.expect(",")
    scanner.expect("}")
    return members


class _Scanner:
    """Reads JSON from pieces of text and holds one piece at a time."""

    def __init__(self, pieces: Iterable[str], where: str) -> None:
        self._pieces = iter(pieces)
        self._held = ""
        self._where = where

    def peek(self) -> str:
        """The next character that is not white space; an empty string at the end."""
        self._skip(_SPACE)
        return self._held[:1]

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self._error()
        self._held = self._held[1:]

    def string(self) -> Iterator[str]:
        """Yield the pieces of the string that begins at the current position."""
        self.expect('"')
        while True:
            end = self._end_of_whole()
            if end:
                yield json.loads(f'"{self._held[:end]}"', strict=False)
                self._held = self._held[end:]
            if self._held.startswith('"'):
                self._held = self._held[1:]
                return
            if len(self._held) < _LONGEST_CHARACTER and self._more():
                continue
            if not _HALF.match(self._held):
                raise self._error()
            yield json.loads(f'"{self._held[:6]}"')
            self._held = self._held[6:]

    def skip_value(self) -> None:
        depth = 0
        while True:
            character = self.peek()
            if character == '"':
                for _ in self.string():
                    pass
            elif character and character in "{[":
                depth += 1
                self._held = self._held[1:]
            elif character and character in "}]":
                depth -= 1
                self._held = self._held[1:]
            elif character:
                self._skip(_NO_BRACKET if depth else _SCALAR)
            else:
                raise self._error()
            if depth <= 0:
                return

    def _end_of_whole(self) -> int:
        match = _WHOLE.match(self._held)
        return match.end() if match else 0

    def _skip(self, pattern: re.Pattern[str]) -> None:
        while True:
            match = pattern.match(self._held)
            self._held = self._held[match.end() if match else 0 :]
            if self._held or not self._more():
                return

    def _more(self) -> bool:
        for piece in self._pieces:
            if piece:
                self._held += piece
                return True
        return False

    def _error(self) -> NotTextError:
        return NotTextError(f"{self._where} is not JSON; write one object per line")
