"""Sync points: members of a group exchange weights at some steps (DiLoCo, arXiv 2311.08105)."""
