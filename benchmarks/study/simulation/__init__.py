"""Simulates the training of sub-models on spot machines, event by event, with the product's own policies."""
