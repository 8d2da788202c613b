"""Examine machines before they train: cards, kernels, memory, speed, network, storage and resuming."""
