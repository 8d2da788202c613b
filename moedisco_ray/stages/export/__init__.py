"""Export the finished model as a Hugging Face directory that loads without this package.

It has a model card and sample texts.
"""
