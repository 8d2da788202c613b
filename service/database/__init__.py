"""Persistent state of the service: SQLAlchemy over SQLite (WAL) or PostgreSQL."""
