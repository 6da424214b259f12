"""Captions as tokens, v0.1 only: WordPiece with a published vocabulary file, through the `tokenizers` library (spec 7.2, 7.3).

The reference pads a batch to its longest caption before it appends [EOS], so that a caption's tokens depend on the captions around it.
Here [EOS] follows the caption and padding comes last; alone in its batch, a caption has the reference's tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from terramind_jax import coordinates, modalities

MASK = " [S_1]"  # ends every caption: from here on the model may write
MAX_TOKENS = modalities.STREAMS["caption"].max_tokens


def load(path: str | os.PathLike) -> Tokenizer:
    """The vocabulary of a Hugging Face tokenizers JSON, as `hub.vocabulary("caption")` fetches it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, or one without the special tokens at the ids that the model knows.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no caption vocabulary at {path}.")
    try:
        vocabulary = Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is no vocabulary of the tokenizers library: {error}.") from error
    wrong = [text for text, i in coordinates.SPECIALS.items() if vocabulary.token_to_id(text) != i]
    if wrong:
        raise ValueError(f"The caption vocabulary {path} lacks {', '.join(wrong)}, or has them at other ids than the model.")
    vocabulary.no_padding()  # the file may switch either on
    vocabulary.no_truncation()
    return vocabulary


def encode(vocabulary: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Captions -> int32 ids ``[B, L]``: word pieces, [S_1], [EOS], then padding. One of more than 256 ids is a ValueError."""
    if isinstance(texts, str):
        raise ValueError("Captions are one string, expected a list with one string a sample.")
    rows = [[*encoding.ids, coordinates.EOS] for encoding in vocabulary.encode_batch([text + MASK for text in texts])]
    longest = max(map(len, rows), default=0)
    if longest > MAX_TOKENS:
        which = next(i for i, row in enumerate(rows) if len(row) > MAX_TOKENS)
        raise ValueError(f"Caption {which} has {len(rows[which])} tokens; the model takes {MAX_TOKENS}.")
    ids = np.full((len(rows), longest), coordinates.PAD, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids


def decode(vocabulary: Tokenizer, ids: np.ndarray) -> list[str]:
    """Ids ``[B, L]`` -> captions: without padding and [EOS], other special tokens kept, sentences capitalised (spec 7.2)."""
    texts = [vocabulary.decode([i for i in row if i != coordinates.PAD], skip_special_tokens=False) for row in np.asarray(ids).tolist()]
    return [_capitalize(text.replace(" [EOS]", "")) for text in texts]


def _capitalize(text: str) -> str:
    """Every sentence with one capital, its first letter."""
    return "".join(part.capitalize() for part in re.split(r"([.!?] *)", text))
