"""Captions of v0.1: WordPiece with a vocabulary file (spec 7.2)."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from terramind_jax import captions, coordinates

WORDS = ("a", "river", "with", "fields", "city", "##s", ".", ",", "the", "sea")
FIRST = 300  # id of the first word


def write(path, specials=coordinates.SPECIALS) -> str:
    """A small vocabulary file of the kind that the reference reads."""
    vocabulary = Tokenizer(models.WordPiece({**specials, **{word: FIRST + i for i, word in enumerate(WORDS)}}, unk_token="[UNK]"))
    vocabulary.normalizer, vocabulary.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    vocabulary.decoder = decoders.WordPiece()
    vocabulary.add_tokens([AddedToken(text, normalized=False, special=True) for text in specials])
    vocabulary.enable_padding()
    vocabulary.save(str(path))
    return str(path)


@pytest.fixture
def vocabulary(tmp_path):
    return captions.load(write(tmp_path / "config.json"))


def test_words_then_sentinel_end_and_padding(vocabulary):
    ids = captions.encode(vocabulary, ["A river with fields.", "Citys"])
    assert ids.dtype == np.int32
    assert ids.tolist() == [[300, 301, 302, 303, 306, 5, 3], [304, 305, 5, 3, 0, 0, 0]]


def test_a_caption_does_not_depend_on_its_batch(vocabulary):
    alone, beside = captions.encode(vocabulary, ["The sea"]), captions.encode(vocabulary, ["The sea", "a river, with fields, a city."])
    np.testing.assert_array_equal(beside[0, : alone.shape[1]], alone[0])
    assert (beside[0, alone.shape[1] :] == coordinates.PAD).all()


def test_decode_drops_padding_and_end_and_capitalises_sentences(vocabulary):
    ids = captions.encode(vocabulary, ["a RIVER. the sea, a city."])
    assert captions.decode(vocabulary, ids) == ["A river. The sea, a city. [s_1]"]
    assert captions.decode(vocabulary, [[300, 304, 305, 3, 0]]) == ["A citys"]


def test_unknown_words_are_unk(vocabulary):
    assert captions.encode(vocabulary, ["volcano"]).tolist() == [[coordinates.UNK, 5, 3]]


def test_no_captions_give_no_rows(vocabulary):
    assert captions.encode(vocabulary, []).shape == (0, 0)


def test_too_long_a_caption_is_refused(vocabulary):
    assert captions.encode(vocabulary, ["sea " * 254]).shape == (1, 256)
    with pytest.raises(ValueError, match="Caption 1 has 257 tokens; the model takes 256"):
        captions.encode(vocabulary, ["sea", "sea " * 255])


def test_one_string_is_refused(vocabulary):
    with pytest.raises(ValueError, match="one string, expected a list"):
        captions.encode(vocabulary, "a river")


def test_ids_pass_and_stay_ids_without_a_vocabulary(vocabulary):
    ids = np.array([[300, 301, 5, 3], [304, 5, 3, 0]])
    for given in (vocabulary, None):
        encoded = captions.encode(given, ids)
        assert encoded.dtype == np.int32
        np.testing.assert_array_equal(encoded, ids)
    np.testing.assert_array_equal(captions.decode(None, ids), ids)
    with pytest.raises(ValueError, match=r"no caption vocabulary.*Tokenizer-Text/config.json .* tokenizers='hub'"):
        captions.encode(None, ["a river"])


@pytest.mark.parametrize(
    "ids, message",
    [
        (np.zeros((2, 3)), r"Captions are float64 \[2, 3\]; expected a list of strings, or integer ids"),
        (np.zeros(3, int), r"Captions are int64 \[3\]"),
        (np.ones((1, 257), int), "at most 256 tokens"),
        (np.array([[5, 30_000]]), "ids from 5 to 30000; the model has 0-29999"),
    ],
)
def test_what_is_neither_text_nor_ids_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        captions.encode(None, ids)


def test_a_missing_a_foreign_and_another_vocabulary_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no caption vocabulary at .*none.json"):
        captions.load(tmp_path / "none.json")
    (tmp_path / "foreign.json").write_text("{}")
    with pytest.raises(ValueError, match="foreign.json is no vocabulary"):
        captions.load(tmp_path / "foreign.json")
    with pytest.raises(ValueError, match=r"lacks \[EOS\], or has them at other ids"):
        captions.load(write(tmp_path / "other.json", {**coordinates.SPECIALS, "[EOS]": 9}))
