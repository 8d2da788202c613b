"""A phase of sub-models on spot machines, event by event, decided by the product's own policies."""
