"""Packed tokens on disk, windows over them, and the order in which training visits the windows.

A packed directory holds the token ids of documents:

    *.npy           1-D little-endian uint16, or uint32 for a vocabulary above 65,536 entries
    *.starts        one bit per token of the file of the same name: whether a document begins at it
    index.json      {"version", "tokens", "documents", "dtype", "parts"}, and if there are conversations,
                    "conversations", by the name of each part that holds some the number of its full windows, and
                    "joined", the groups of other windows that are together one window

With a file of conversations:

    *.mask          one bit per token: whether the loss counts it
    *.windows.npy   first token of each window, and the number of tokens at the end

Running text is one stream, which windows cut anywhere. An end-of-sequence token follows each document, and a
beginning-of-sequence token precedes it if the tokenizer adds one. A document begins at the token from which its first
token is predicted: the beginning-of-sequence token, or else the end-of-sequence token of the document before.

Conversations, and other documents with a mask, are whole in one window, with nothing after them but the next one, and
padding at the window's end. They begin at their own first token, which no other one predicts.

Version 1, without the key "version", has no files of starts. Conversations are running text there, and "masked" names
the parts with a mask.
"""

from moedisco_ray.packed_tokens.best_fit import best_fit
from moedisco_ray.packed_tokens.files import (
    INDEX,
    Ids,
    Piece,
    token_dtype,
    write_conversations,
    write_index,
    write_packed,
    write_piece,
)
from moedisco_ray.packed_tokens.order import batch_indices
from moedisco_ray.packed_tokens.stream import TokenStream, check_windows, has_conversations

__all__ = [
    "INDEX",
    "Ids",
    "Piece",
    "TokenStream",
    "batch_indices",
    "best_fit",
    "check_windows",
    "has_conversations",
    "token_dtype",
    "write_conversations",
    "write_index",
    "write_packed",
    "write_piece",
]
