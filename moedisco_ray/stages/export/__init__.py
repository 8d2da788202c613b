"""Export the finished model, with a model card and sample texts, as a Hugging Face directory that loads without this package."""
