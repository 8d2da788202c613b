"""HTTP: requests in, documents out. Routes check who asks and what, call the store, and shape the answer."""
