"""What the service decides, as pure functions over plain values: no database, no network, no clock of its own."""
