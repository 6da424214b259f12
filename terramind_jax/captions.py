"""Captions as tokens, v0.1 only: WordPiece with a published vocabulary file, through the `tokenizers` library (spec 7.2, 7.3).

The file is the published one or it is not there: without it (None) captions are ids, in and out.

The reference pads a batch to its longest caption before it appends [EOS], so that a caption's tokens depend on the captions around it.
Here [EOS] follows the caption and padding comes last; alone in its batch, a caption has the reference's tokens.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from terramind_jax import coordinates, modalities, zoo

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


def encode(vocabulary: Tokenizer | None, texts: Sequence[str] | np.ndarray) -> np.ndarray:
    """Captions -> int32 ids ``[B, L]``: word pieces, [S_1], [EOS], then padding. Ids ``[B, L]`` pass as they are.

    Raises:
      ValueError: more than 256 ids, ids that the model does not have, or strings without a vocabulary.
    """
    if isinstance(texts, str):
        raise ValueError("Captions are one string, expected a list with one string a sample.")
    if not all(isinstance(text, str) for text in texts):
        return _check_ids(np.asarray(texts))
    if vocabulary is None:
        raise ValueError(
            "This model has no caption vocabulary, so that captions are ids [B, L]; for strings save "
            f"{'/'.join(zoo.VOCABULARIES['caption'])} of the Hugging Face hub as FOLDER/caption.json and load with tokenizers=FOLDER, "
            "or load with tokenizers='hub'."
        )
    rows = [[*encoding.ids, coordinates.EOS] for encoding in vocabulary.encode_batch([text + MASK for text in texts])]
    longest = max(map(len, rows), default=0)
    if longest > MAX_TOKENS:
        which = next(i for i, row in enumerate(rows) if len(row) > MAX_TOKENS)
        raise ValueError(f"Caption {which} has {len(rows[which])} tokens; the model takes {MAX_TOKENS}.")
    ids = np.full((len(rows), longest), coordinates.PAD, np.int32)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids


def _check_ids(ids: np.ndarray) -> np.ndarray:
    if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.shape[1] > MAX_TOKENS:
        expected = f"a list of strings, or integer ids [B, L] of at most {MAX_TOKENS} tokens"
        raise ValueError(f"Captions are {ids.dtype} {list(ids.shape)}; expected {expected}.")
    if ids.size and not 0 <= ids.min() <= ids.max() < coordinates.VOCAB_SIZE:
        raise ValueError(f"Captions have ids from {ids.min()} to {ids.max()}; the model has 0-{coordinates.VOCAB_SIZE - 1}.")
    return ids.astype(np.int32)


def decode(vocabulary: Tokenizer | None, ids: np.ndarray) -> list[str] | np.ndarray:
    """Ids ``[B, L]`` -> captions: without padding and [EOS], other special tokens kept, sentences capitalised (spec 7.2).

    Without a vocabulary the ids.
    """
    if vocabulary is None:
        return np.asarray(ids)
    texts = [vocabulary.decode([i for i in row if i != coordinates.PAD], skip_special_tokens=False) for row in np.asarray(ids).tolist()]
    return [_capitalize(text.replace(" [EOS]", "")) for text in texts]


def _capitalize(text: str) -> str:
    """Every sentence with one capital, its first letter."""
    return "".join(part.capitalize() for part in re.split(r"([.!?] *)", text))
