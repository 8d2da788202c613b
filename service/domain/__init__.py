"""Decisions of the service as pure functions over plain values: no database, no network, no clock."""
