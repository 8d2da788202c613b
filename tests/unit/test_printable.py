"""Text of other people on a terminal: what a terminal obeys is shown, and all else stays as it is."""

from __future__ import annotations

import io
import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from moedisco_ray.cli.console import PrintableConsole, say_text
from moedisco_ray.core.printable import PrintableStream, escape_output, one_line, printable, progress_bars

ANY = st.text(st.characters() | st.characters(categories=("Cc", "Cs", "Cf", "Zl", "Zp")))
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def obeyed(text: str) -> bool:
    return any(
        each in BIDI or (unicodedata.category(each) in ("Cc", "Zl", "Zp", "Cs") and each not in "\n\t") for each in text
    )


@given(ANY)
def test_nothing_is_left_that_a_terminal_obeys_and_all_else_stays(text: str) -> None:
    shown = printable(text)
    assert not obeyed(shown)
    assert printable(shown) == shown
    assert (shown == text) == (not obeyed(text))
    assert "\n" not in one_line(text)


@given(ANY.filter(lambda text: not any(unicodedata.category(each) == "Cs" for each in text)))
def test_an_escape_in_a_json_string_means_the_same_character(text: str) -> None:
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


@given(ANY)
def test_a_table_is_drawn_around_the_escapes(text: str) -> None:
    stream = io.StringIO()
    table = Table(text)
    table.add_row(text, Text(text))
    PrintableConsole(stream, width=80).print(table, text, Text(text))
    assert not obeyed(stream.getvalue())


def test_a_cell_is_as_wide_as_its_escapes() -> None:
    stream = io.StringIO()
    table = Table("a", "b", show_edge=False)
    table.add_row("\x1b[2J", "\x9b")
    table.add_row("plain", "plain")
    PrintableConsole(stream, width=80).print(table)
    lines = stream.getvalue().splitlines()
    assert [line.rstrip() for line in lines[2:]] == [" \\u001b[2J │ \\u009b", " plain     │ plain"]


def test_a_name_is_no_markup_and_no_emoji() -> None:
    stream = io.StringIO()
    PrintableConsole(stream, width=80).print("[red]:skull:[/red]")
    assert stream.getvalue() == "[red]:skull:[/red]\n"


def test_a_traceback_and_a_print_of_a_library_are_escaped_too(capsys: pytest.CaptureFixture[str]) -> None:
    streams = sys.stdout, sys.stderr
    try:
        escape_output()
        escape_output()
        print("a \x1b[2J")  # noqa: T201 - as a library does
        sys.__excepthook__(ValueError, ValueError("b \x9b"), None)  # others may have been set by then
        say_text("\x1b[31mred\x1b[0m \x1b]0;title\x07\n")
    finally:
        sys.stdout, sys.stderr = streams
    out, err = capsys.readouterr()
    assert out == "a \\u001b[2J\nred \\u001b]0;title\\u0007\n"
    assert err == "ValueError: b \\u009b\n"


def test_a_progress_bar_moves_and_its_text_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = io.StringIO()
    monkeypatch.setattr(sys, "stderr", PrintableStream(behind))
    with progress_bars():
        for text in ("\rmodel\r\x1b[2J: 10%", "\n\x1b[A", "\x1b[2Jname"):
            sys.stderr.write(text)
    sys.stderr.write("\r")
    assert behind.getvalue() == "\rmodel\\u000d\\u001b[2J: 10%\n\x1b[A\\u001b[2Jname\\u000d"
