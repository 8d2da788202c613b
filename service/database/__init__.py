"""Where the service keeps what must survive it: SQLAlchemy over SQLite (WAL) or PostgreSQL."""
