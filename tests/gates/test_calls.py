"""No call passes more than five arguments by position: the reader of a call should see what each value is."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 5
COLUMNS = {"PlainTable", "add_row", "create_table", "left_aligned", "Literal"}
"""Calls that take a list of columns, whatever its length."""


def test_no_call_has_more_than_five_positional_arguments():
    found = []
    for path in (*(ROOT / "moedisco_ray").rglob("*.py"), *(ROOT / "service").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and len(call.args) > MOST:
                name = ast.unparse(call.func).rpartition(".")[2]
                if name not in COLUMNS:
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno} {name}")
    assert not found
