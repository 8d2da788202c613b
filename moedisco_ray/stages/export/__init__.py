"""The finished model as a Hugging Face directory that needs nothing of this package, and what it writes."""
