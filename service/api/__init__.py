"""HTTP: routes check the caller and the request, call the database, and build the response."""
