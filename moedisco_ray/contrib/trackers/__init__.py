"""Experiment trackers, one per file; `cli.tracking` says what a tracker does."""
