"""Checks and plans requested runs in processes with limits on time and memory, so that the service stays responsive."""
