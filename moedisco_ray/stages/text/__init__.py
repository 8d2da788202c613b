"""Text modules that several stages use: tokenizers, cutting into documents, packing, validation documents."""
