"""The quality benchmark: `run.py` measures, `section.py` reports."""
