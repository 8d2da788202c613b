"""Sync points: sub-models exchange their backbones at some steps (DiLoCo, arXiv 2311.08105)."""
