"""What several stages know of text: tokenizers, documents of bounded length, packed tokens, validation documents."""
