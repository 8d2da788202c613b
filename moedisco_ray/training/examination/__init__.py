"""Trials of a device before it trains: its kernels, memory, speed and copies, and an interrupted training."""
