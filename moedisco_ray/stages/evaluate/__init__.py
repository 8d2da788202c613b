"""Measure models on documents (perplexity, bits per byte, expert load, router entropy, specialisation) and tasks."""
